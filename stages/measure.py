"""Reads the five models and the held-out data; writes their answers and costs to reports/."""

from distill_app.core.inputs import read_inputs
from distill_app.core.stage import run_stage
from distill_app.easydistill.params import TrainParams
from distill_app.evaluation.asking.measure import measure_models
from distill_app.evaluation.asking.params import MeasureParams
from distill_app.evaluation.candidates import compared_models
from distill_app.labeling.params import LabelParams


def main() -> None:
    """Ask teacher, students, and students before distillation."""
    params = read_inputs("measure", MeasureParams)
    label = read_inputs("measure", LabelParams, "label")
    before1 = read_inputs("measure", TrainParams, "train_s1")
    before2 = read_inputs("measure", TrainParams, "train_s2")
    candidates = compared_models(
        label,
        params,
        system1_before=before1.student,
        system2_before=before2.student,
        models_dir="models",
        system1_revision=before1.revision,
        system2_revision=before2.revision,
    )
    measure_models(candidates, params, label, data_dir="data", reports_dir="reports")
    print(f"measure: {len(candidates)} models asked, reports/answers.json and reports/costs.json written")


if __name__ == "__main__":
    run_stage(main)
