"""The options of the two prepare stages."""

import argparse
from pathlib import Path

from distill_app.data.selection import Outputs

FORMATS = ("json", "jsonl", "parquet")


def read_options() -> argparse.Namespace:
    """Return the options: `explain`, a row or None, and where to write what in place of the stage's files."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--explain", type=int, metavar="ROW", help="say what becomes of a row of the slice (from 0) and why"
    )
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="write there, not the stage's own files")
    parser.add_argument("--format", choices=FORMATS, default="json", help="of the records, with --into")
    return parser.parse_args()


def outputs_into(folder: Path, suffix: str) -> Outputs:
    """Return the files of a selection in a folder of one's own."""
    names = (f"train.{suffix}", f"heldout.{suffix}", "rejects.json", "tokens.csv")
    return Outputs(*(str(folder / name) for name in names))
