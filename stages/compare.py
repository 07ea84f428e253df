"""Reads what the models answered and what it cost; writes the verdict and its pages to reports/."""

from distill_app.comparison.compare import compare_models, require_thresholds
from distill_app.comparison.console import print_comparison
from distill_app.comparison.params import CompareParams
from distill_app.core.params import read_params, read_section
from distill_app.core.stage import run_stage


def main() -> None:
    """Write the report; with `compare.fail_below`, fail where a threshold is missed."""
    params = read_section("compare", CompareParams)
    comparison = compare_models(
        params,
        read_params(),
        data_dir="data",
        models_dir="models",
        metrics_dir="metrics",
        reports_dir="reports",
    )
    print_comparison(comparison, "reports/comparison.html")
    if params.fail_below:
        require_thresholds(comparison)


if __name__ == "__main__":
    run_stage(main)
