"""`distill profile`: change to another set of params."""

import argparse
import shutil
import subprocess

HELP = "copy profiles/NAME.yaml over params.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument("name", metavar="NAME", help="of a file in profiles/, without .yaml")


def run(args: argparse.Namespace) -> None:
    """Copy the profile and show what that changed."""
    from distill_app.profiles import use_profile

    use_profile(args.name)
    print(f"params.yaml is now profiles/{args.name}.yaml", flush=True)
    if shutil.which("dvc"):
        subprocess.run(["dvc", "params", "diff"], check=False)
