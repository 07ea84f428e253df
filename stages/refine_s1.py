"""Reads System 1, its training data and the teacher; writes System 1 refined on its own answers, and metrics.

Switched off, it writes that it is, and opens no model.
"""

from distill_app.core.inputs import read_inputs
from distill_app.core.params import read_section
from distill_app.core.stage import run_stage
from distill_app.labeling.params import LabelParams
from distill_app.refining.params import RefineParams
from distill_app.refining.refine import TeacherSource, refine_student


def main() -> None:
    """Refine System 1."""
    params = read_section("refine_s1", RefineParams)
    # Switched off, it opens no teacher
    label = (
        read_inputs("refine_s1", LabelParams, "label") if params.steps else read_section("label", LabelParams)
    )
    metrics = refine_student(
        params,
        TeacherSource(label.teacher, label.revision, label.quantization, label.system_prompt, label.engine),
        student="models/system1",
        data_path="data/train_labeled.json",
        out_dir="models/refined/system1",
        mode="system1",
        metrics_path="metrics/refine_s1.json",
    )
    print("refine_s1:", ", ".join(f"{name} {value}" for name, value in metrics.items()))


if __name__ == "__main__":
    run_stage(main)
