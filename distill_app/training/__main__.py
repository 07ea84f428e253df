"""`python -m distill_app.training --config FILE`."""

import argparse

from distill_app.core.stage import run_stage


def main() -> None:
    """Train as the config says."""
    parser = argparse.ArgumentParser(prog="python -m distill_app.training", description=__doc__)
    parser.add_argument("--config", required=True, help="an EasyDistill 1.0 JSON config")
    parser.add_argument("--data", help="labelled records, in place of the config's dataset.labeled_path")
    parser.add_argument("--logits", help="the teacher's probabilities, in place of dataset.logits_path")
    parser.add_argument("--check", action="store_true", help="look at the config alone and train nothing")
    args = parser.parse_args()
    if args.check:
        from distill_app.training.config import check_training

        check_training(args.config)
        return

    from distill_app.training.train import train_student

    train_student(args.config, args.data, args.logits)


if __name__ == "__main__":
    run_stage(main)
