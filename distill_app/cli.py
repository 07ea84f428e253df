"""The console command `distill`."""

import argparse
import os
import sys
from functools import partial

from distill_app.commands import ask, chat, export, inspect, labels, pin, plan, profile, report
from distill_app.core.stage import report_errors

VERBS = {
    "ask": ask,
    "chat": chat,
    "report": report,
    "export": export,
    "inspect": inspect,
    "labels": labels,
    "profile": profile,
    "pin": pin,
    "plan": plan,
}


def main() -> None:
    """Run the verb that the command line names."""
    parser = argparse.ArgumentParser(prog="distill", description="Ask, judge and hand on distilled students.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, title="verbs")
    for name, verb in VERBS.items():
        description = f"{verb.HELP[0].upper()}{verb.HELP[1:]}."
        verb_parser = verbs.add_parser(name, help=verb.HELP, description=description)
        verb.add_arguments(verb_parser)
    args = parser.parse_args()
    sys.exit(report_errors(partial(_run, args)))


def _run(args: argparse.Namespace) -> None:
    try:
        VERBS[args.verb].run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, as `head` does; what is left has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
