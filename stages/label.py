"""Reads System 1's instructions and the teacher; writes the teacher's answers to both splits, and how sure it
was of those to train on.

The answers are kept under work/, which is no output: it makes the next run cheap and changes no result.
"""

from contextlib import closing

from distill_app.core.files import save_json
from distill_app.core.hub import commits
from distill_app.core.inputs import read_inputs
from distill_app.core.stage import run_stage
from distill_app.generation.engines import open_engine
from distill_app.labeling.label import label_files, tell_hosted_limits, tell_own_settings
from distill_app.labeling.logits import check_top_logits, write_top_logits
from distill_app.labeling.params import LabelParams
from distill_app.labeling.store import AnswerStore

SPLITS = {
    "train": ("data/train_instructions.json", "data/train_labeled.json"),
    "heldout": ("data/heldout_s1.json", "data/heldout_s1_labeled.json"),
}


def main() -> None:
    """Label the training and held-out instructions."""
    params = read_inputs("label", LabelParams)
    check_top_logits(params)  # before any answer is paid for
    tell_hosted_limits(params)
    tell_own_settings(params)
    with closing(open_engine(params)) as engine, AnswerStore(params.store) as store:
        metrics = label_files(engine, store, params, SPLITS, "work/label_dropped.json", "work/label.log")
    write_top_logits(params, "data/train_labeled.json", "data/train_logits.arrow", "work/label.log")
    save_json("metrics/label.json", {**metrics, **commits("label", params)})
    train, heldout = metrics["train"], metrics["heldout"]
    print(
        f"label: {train['kept']} of {train['instructions']} instructions labelled,"
        f" {heldout['kept']} of {heldout['instructions']} held out"
    )


if __name__ == "__main__":
    run_stage(main)
