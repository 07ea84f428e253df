"""Reads configs/system1.json and the data it names; writes the student models/system1."""

from distill_app.core.stage import run_stage
from distill_app.easydistill.run import train_with_config


def main() -> None:
    """Train System 1."""
    loss = train_with_config("configs/system1.json", "metrics/loss_system1.csv")
    print(f"train_s1: models/system1, last training loss {loss:.3f}")


if __name__ == "__main__":
    run_stage(main)
