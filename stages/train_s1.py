"""Reads configs/system1.json and what it names; writes the student, its curves and metrics."""

from distill_app.core.inputs import require_deps
from distill_app.core.stage import run_stage
from distill_app.easydistill.run import named_inputs, train_with_config

CONFIG = "configs/system1.json"


def main() -> None:
    """Train System 1."""
    require_deps("train_s1", CONFIG, named_inputs(CONFIG))
    metrics = train_with_config(CONFIG, "metrics/train_s1.json")
    print("train_s1: models/system1,", ", ".join(f"{name} {value}" for name, value in metrics.items()))


if __name__ == "__main__":
    run_stage(main)
