"""Reads the training params of both systems; checks and writes their EasyDistill configs and templates.

It opens none of what they name. A Hub student gets its commit here, and a Hub dataset the one that was
read: the config is the training's whole input.
"""

from distill_app.core.files import read_json
from distill_app.core.hub import read_at_commits
from distill_app.core.params import read_section
from distill_app.core.stage import run_stage
from distill_app.data.params import PrepareS1Params, PrepareS2Params
from distill_app.easydistill.config import write_system1_config, write_system2_config
from distill_app.easydistill.params import TrainParams
from distill_app.labeling.params import LabelParams
from distill_app.training.config import check_training


def main() -> None:
    """Write both configs."""
    s1, s2 = (
        read_at_commits("write_config", name, read_section(name, TrainParams))
        for name in ("train_s1", "train_s2")
    )
    label = read_section("label", LabelParams)
    source = source_of(read_section("prepare_s1", PrepareS1Params).dataset, "metrics/prepare_s1.json")
    first = write_system1_config(
        config_path="configs/system1.json",
        teacher_model=label.teacher,
        teacher_revision=label.revision,
        student_model=s1.student,
        # What the label stage left out had no whole answer; the training must not ask for it again
        instruction_path="data/train_labeled.json",
        out_dir="models/system1",
        num_epochs=s1.num_epochs,
        training=s1.training_options(),
        seed=s1.seed,
        extra={**s1.extra_sections("data/train_logits.arrow"), "source": source},
    )
    source = source_of(read_section("prepare_s2", PrepareS2Params).dataset, "metrics/prepare_s2.json")
    second = write_system2_config(
        config_path="configs/system2.json",
        student_model=s2.student,
        out_dir="models/system2",
        num_epochs=s2.num_epochs,
        training=s2.training_options(),
        seed=s2.seed,
        extra={**s2.extra_sections("data/traces_logits.arrow"), "source": source},
    )
    for path in (first, second):
        check_training(path)  # before anything that takes hours
    print(f"write_config: {first}, {second}")


def source_of(dataset: str, metrics_path: str) -> str:
    """Return a dataset as a card names it: of the Hub with the commit that the prepare stage read."""
    commit = read_json(metrics_path).get("commits", {}).get(dataset)
    return dataset if commit is None else f"{dataset}@{commit}"


if __name__ == "__main__":
    run_stage(main)
