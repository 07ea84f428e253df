"""Reads both students, their starting points, the teacher and the held-out data; writes reports/."""

from distill_app.comparison.compare import compare_systems
from distill_app.comparison.console import print_scores
from distill_app.comparison.params import CompareParams
from distill_app.core.params import read_section
from distill_app.core.stage import run_stage
from distill_app.easydistill.params import TrainParams, WordsAndProbabilities
from distill_app.labeling.params import LabelParams


def main() -> None:
    """Measure all models and write the report."""
    scores = compare_systems(
        read_section("compare", CompareParams),
        teacher=read_section("label", LabelParams),
        system1_before=read_section("train_s1", WordsAndProbabilities).student,
        system2_before=read_section("train_s2", TrainParams).student,
        data_dir="data",
        models_dir="models",
        metrics_dir="metrics",
        reports_dir="reports",
    )
    print_scores(scores, "reports/comparison.html")


if __name__ == "__main__":
    run_stage(main)
