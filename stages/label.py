"""Reads System 1's instructions and the teacher; writes the teacher's answers to both splits."""

from distill_app.core.files import read_records, save_json
from distill_app.core.models import load_teacher
from distill_app.core.params import read_section
from distill_app.core.stage import run_stage
from distill_app.labeling.label import label_splits
from distill_app.labeling.params import LabelParams


def main() -> None:
    """Label the training and held-out instructions."""
    params = read_section("label", LabelParams)
    train = read_records("data/train_instructions.json")
    heldout = read_records("data/heldout_s1.json")
    model, tokenizer = load_teacher(params.teacher, params.quantization, params.revision)
    labeled, labeled_heldout, metrics = label_splits(model, tokenizer, train, heldout, params)
    save_json("data/train_labeled.json", labeled)
    save_json("data/heldout_s1_labeled.json", labeled_heldout)
    save_json("metrics/label.json", metrics)
    print(f"label: {len(labeled)} of {len(train)} instructions labelled, {len(labeled_heldout)} held out")


if __name__ == "__main__":
    run_stage(main)
