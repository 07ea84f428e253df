"""Reads the five models and task files; writes the scores on standard tasks to reports/benchmarks.json."""

from distill_app.benchmarking.params import BenchmarkParams, TeacherWeights
from distill_app.benchmarking.run import run_benchmarks
from distill_app.core.files import save_json
from distill_app.core.params import read_section
from distill_app.core.stage import run_stage
from distill_app.easydistill.params import TrainParams, WordsAndProbabilities
from distill_app.labeling.params import LabelParams


def main() -> None:
    """Run the benchmarks; without tasks, write that there are none."""
    results = run_benchmarks(
        read_section("benchmark", BenchmarkParams),
        label=read_section("label", LabelParams),
        teacher=read_section("measure", TeacherWeights).teacher,
        system1_before=read_section("train_s1", WordsAndProbabilities).student,
        system2_before=read_section("train_s2", TrainParams).student,
        models_dir="models",
        log_path="work/benchmark.log",
    )
    save_json("reports/benchmarks.json", results)
    print(f"benchmark: {', '.join(results) or 'no task asked for'} -> reports/benchmarks.json")


if __name__ == "__main__":
    run_stage(main)
