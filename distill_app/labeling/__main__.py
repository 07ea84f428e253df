"""`python -m distill_app.labeling --config FILE --out PATH [--logits-out PATH]`."""

import argparse

from distill_app.core.stage import run_stage


def main() -> None:
    """Write the labelled records that the config's training is to use."""
    parser = argparse.ArgumentParser(prog="python -m distill_app.labeling", description=__doc__)
    parser.add_argument("--config", required=True, help="an EasyDistill 1.0 JSON config of a labelling job")
    parser.add_argument("--out", required=True, help="the labelled records to write")
    parser.add_argument("--logits-out", help="the teacher's likeliest tokens to write, for kd_white_box")
    arguments = parser.parse_args()

    from distill_app.labeling.job import label_job

    print(label_job(arguments.config, arguments.out, arguments.logits_out))


if __name__ == "__main__":
    run_stage(main)
