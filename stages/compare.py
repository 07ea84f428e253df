"""Reads what the models answered and what it cost; writes the verdict and its pages to reports/."""

from distill_app.core.inputs import read_inputs
from distill_app.core.params import read_params
from distill_app.core.stage import run_stage
from distill_app.evaluation.compare import compare_models
from distill_app.evaluation.params import CompareParams
from distill_app.evaluation.verdict import require_targets
from distill_app.report.console import outcome_line
from distill_app.report.write import write_report


def main() -> None:
    """Write the report; with `compare.fail_below`, fail where a target is missed."""
    params = read_inputs("compare", CompareParams)
    comparison, answers = compare_models(params, "data", "metrics", "reports")
    write_report(comparison, answers, read_params(), "models", "metrics", "reports")
    print(f"compare: {outcome_line(comparison, 'reports/comparison.html')}")
    if params.fail_below:
        require_targets(comparison)


if __name__ == "__main__":
    run_stage(main)
