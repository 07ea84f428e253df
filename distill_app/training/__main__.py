"""`python -m distill_app.training --config FILE`."""

import argparse

from distill_app.core.stage import run_stage


def main() -> None:
    """Train as the config says."""
    parser = argparse.ArgumentParser(prog="python -m distill_app.training", description=__doc__)
    parser.add_argument("--config", required=True, help="an EasyDistill 1.0 JSON config")
    path = parser.parse_args().config

    from distill_app.training.train import train_student

    train_student(path)


if __name__ == "__main__":
    run_stage(main)
