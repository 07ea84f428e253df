"""Reads the five models and task files; writes the scores on standard tasks to reports/benchmarks.json."""

from distill_app.core.files import save_json
from distill_app.core.inputs import read_inputs
from distill_app.core.stage import run_stage
from distill_app.easydistill.params import TrainParams
from distill_app.evaluation.benchmarks.params import BenchmarkParams
from distill_app.evaluation.benchmarks.run import run_benchmarks
from distill_app.evaluation.candidates import TeacherParams
from distill_app.labeling.params import LabelParams


def main() -> None:
    """Run the benchmarks; without tasks, write that there are none."""
    params = read_inputs("benchmark", BenchmarkParams)
    before1 = read_inputs("benchmark", TrainParams, "train_s1")
    before2 = read_inputs("benchmark", TrainParams, "train_s2")
    results = run_benchmarks(
        params,
        label=read_inputs("benchmark", LabelParams, "label"),
        teacher=read_inputs("benchmark", TeacherParams, "measure"),
        system1_before=before1.student,
        system2_before=before2.student,
        system1_revision=before1.revision,
        system2_revision=before2.revision,
        models_dir="models",
        log_path="work/benchmark.log",
    )
    save_json("reports/benchmarks.json", results)
    print(f"benchmark: {', '.join(results) or 'no task asked for'} -> reports/benchmarks.json")


if __name__ == "__main__":
    run_stage(main)
