"""Reads the training params of both systems; writes their EasyDistill configs and prompt templates."""

from distill_app.core.params import read_section
from distill_app.core.stage import run_stage
from distill_app.easydistill.config import write_system1_config, write_system2_config
from distill_app.easydistill.params import TrainParams
from distill_app.labeling.params import LabelParams


def main() -> None:
    """Write both configs."""
    s1 = read_section("train_s1", TrainParams)
    s2 = read_section("train_s2", TrainParams)
    first = write_system1_config(
        config_path="configs/system1.json",
        teacher_model=read_section("label", LabelParams).teacher,
        student_model=s1.student,
        out_dir="models/system1",
        num_epochs=s1.num_epochs,
        training=s1.training_options(),
        seed=s1.seed,
        backend=s1.backend,
    )
    second = write_system2_config(
        config_path="configs/system2.json",
        student_model=s2.student,
        out_dir="models/system2",
        num_epochs=s2.num_epochs,
        training=s2.training_options(),
        seed=s2.seed,
        backend=s2.backend,
    )
    print(f"write_config: {first}, {second}")


if __name__ == "__main__":
    run_stage(main)
