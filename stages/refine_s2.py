"""Reads System 2, its training data and the teacher, or problems to verify by; writes System 2 refined on its
own answers, and metrics.

Switched off, it writes that it is, and opens no model.
"""

from typing import Any

from distill_app.core.files import save_text
from distill_app.core.inputs import read_inputs, require_deps
from distill_app.core.params import read_section
from distill_app.core.stage import run_stage
from distill_app.easydistill.run import named_inputs
from distill_app.labeling.params import LabelParams
from distill_app.refining.params import RefineS2Params
from distill_app.refining.refine import TeacherSource, refine_student, steps_csv
from distill_app.refining.verified import VerifiedInputs, refine_by_verification, rounds_csv

STUDENT, DATA, CONFIG = "models/system2", "data/omnithought_cot.json", "configs/system2.json"
OUT, METRICS = "models/refined/system2", "metrics/refine_s2.json"


def main() -> None:
    """Refine System 2."""
    params = read_inputs("refine_s2", RefineS2Params)
    metrics = _verify(params) if params.verifies else _on_policy(params)
    print("refine_s2:", ", ".join(f"{name} {value}" for name, value in metrics.items()))


def _verify(params: RefineS2Params) -> dict[str, Any]:
    require_deps("refine_s2", CONFIG, named_inputs(CONFIG))
    label = read_section("label", LabelParams)
    inputs = VerifiedInputs(STUDENT, CONFIG, DATA, "data/heldout_s2.json")
    metrics = refine_by_verification(params, label, inputs, OUT, METRICS)
    save_text("metrics/refine_s2.csv", steps_csv([]))
    return metrics


def _on_policy(params: RefineS2Params) -> dict[str, Any]:
    if params.method == "verified":
        params = params.model_copy(update={"steps": 0})
    # Switched off, it opens no teacher
    label = (
        read_inputs("refine_s2", LabelParams, "label") if params.steps else read_section("label", LabelParams)
    )
    teacher = TeacherSource(
        label.teacher, label.revision, label.quantization, label.system_prompt, label.engine
    )
    save_text("metrics/refine_s2_rounds.csv", rounds_csv([]))
    return refine_student(params, teacher, STUDENT, DATA, OUT, "system2", METRICS)


if __name__ == "__main__":
    run_stage(main)
