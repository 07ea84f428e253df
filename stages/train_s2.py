"""Reads configs/system2.json and what it names; writes the student, its curves and metrics."""

from distill_app.core.stage import run_stage
from distill_app.easydistill.run import train_with_config


def main() -> None:
    """Train System 2."""
    metrics = train_with_config("configs/system2.json", "metrics/train_s2.json")
    print("train_s2: models/system2,", ", ".join(f"{name} {value}" for name, value in metrics.items()))


if __name__ == "__main__":
    run_stage(main)
