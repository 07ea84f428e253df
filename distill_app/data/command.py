"""The one option of the two prepare stages."""

import argparse


def explained_row() -> int | None:
    """Return the row of `--explain ROW`, from 0 in the slice; None where the stage is to run."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--explain", type=int, metavar="ROW", help="say what becomes of a row of the slice (from 0) and why"
    )
    return parser.parse_args().explain
