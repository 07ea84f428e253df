"""Reads the five models and the held-out data; writes their answers and costs to reports/."""

from distill_app.core.params import read_section
from distill_app.core.stage import run_stage
from distill_app.easydistill.params import TrainParams, WordsAndProbabilities
from distill_app.labeling.candidates import five_models
from distill_app.labeling.params import LabelParams
from distill_app.measuring.measure import measure_models
from distill_app.measuring.params import MeasureParams


def main() -> None:
    """Ask teacher, students, and students before distillation."""
    params = read_section("measure", MeasureParams)
    label = read_section("label", LabelParams)
    candidates = five_models(
        label,
        params.teacher,
        system1_before=read_section("train_s1", WordsAndProbabilities).student,
        system2_before=read_section("train_s2", TrainParams).student,
        models_dir="models",
    )
    measure_models(candidates, params, label, data_dir="data", reports_dir="reports")
    print(f"measure: {len(candidates)} models asked, reports/answers.json and reports/costs.json written")


if __name__ == "__main__":
    run_stage(main)
