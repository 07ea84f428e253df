"""Reads configs/system2.json and the data it names; writes the student models/system2."""

from distill_app.core.stage import run_stage
from distill_app.easydistill.run import train_with_config


def main() -> None:
    """Train System 2."""
    loss = train_with_config("configs/system2.json", "metrics/loss_system2.csv")
    print(f"train_s2: models/system2, last training loss {loss:.3f}")


if __name__ == "__main__":
    run_stage(main)
