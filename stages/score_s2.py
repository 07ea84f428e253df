"""Reads System 2's training traces and the teacher; writes how likely the teacher finds them.

The traces are the dataset's, so the teacher is asked nothing.
"""

from distill_app.core.inputs import read_inputs
from distill_app.core.params import read_section
from distill_app.core.stage import run_stage
from distill_app.labeling.logits import write_top_logits
from distill_app.labeling.params import LabelParams, ScoreParams


def main() -> None:
    """Score the training traces."""
    top = read_section("score_s2", ScoreParams).top_logits
    # Switched off, it opens no teacher
    label = read_inputs("score_s2", LabelParams, "label") if top else read_section("label", LabelParams)
    teacher = label.model_copy(update={"top_logits": top})
    rows = write_top_logits(
        teacher, "data/omnithought_cot.json", "data/traces_logits.arrow", "work/score_s2.log", "system2"
    )
    print(f"score_s2: {rows} traces scored by the teacher" if top else "score_s2: off, top_logits is 0")


if __name__ == "__main__":
    run_stage(main)
