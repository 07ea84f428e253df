"""`distill report`: the verdict of the last comparison."""

import argparse

HELP = "print the verdict of the last comparison"
REPORT = "reports/comparison.html"
SCORES = "reports/comparison.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes: nothing."""


def run(args: argparse.Namespace) -> None:
    """Print the figures, the verdict and where the report lies."""
    from distill_app.core.files import read_json
    from distill_app.report.console import print_comparison

    print_comparison(read_json(SCORES), REPORT)
