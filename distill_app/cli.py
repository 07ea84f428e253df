"""The console command `distill`."""

import argparse
import shutil
import subprocess
import sys
from functools import partial

from distill_app.core.stage import report_errors

REPORT = "reports/comparison.html"
SCORES = "reports/comparison.json"


def main() -> None:
    """Run the verb that the command line names."""
    parser = argparse.ArgumentParser(prog="distill", description="Ask and judge distilled students.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    ask = verbs.add_parser("ask", help="ask a model one question")
    ask.add_argument("model", help="checkpoint folder or Hub id, e.g. models/system2")
    ask.add_argument("question", help='the question, or "-" to read it from standard input')
    ask.add_argument("--max-new-tokens", type=int, default=256)
    profile = verbs.add_parser("profile", help="copy profiles/NAME.yaml over params.yaml")
    profile.add_argument("name")
    verbs.add_parser("report", help="print the verdict of the last comparison")
    run = partial(_VERBS[(args := parser.parse_args()).verb], args)
    sys.exit(report_errors(run))


def _ask(args: argparse.Namespace) -> None:
    from distill_app.core.models import load_student
    from distill_app.labeling.answers import Sampling
    from distill_app.labeling.engine import generate

    question = sys.stdin.read() if args.question == "-" else args.question
    if not question.strip():
        raise ValueError("question: found nothing, expected text; write it after the model")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: found {args.max_new_tokens}, expected 1 or more")
    model, tokenizer = load_student(args.model)
    if not tokenizer.chat_template:
        raise ValueError(f"{args.model}: no chat template in it; ask a distilled or instruct model")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question.strip()}], tokenize=False, add_generation_prompt=True
    )
    answer = generate(model, tokenizer, [prompt], Sampling(args.max_new_tokens))[0]
    print(answer.text)
    if answer.finish_reason == "length":
        print(f"(cut at {args.max_new_tokens} tokens)", file=sys.stderr)


def _profile(args: argparse.Namespace) -> None:
    from distill_app.profiles import use_profile

    use_profile(args.name)
    print(f"params.yaml is now profiles/{args.name}.yaml", flush=True)
    if shutil.which("dvc"):
        subprocess.run(["dvc", "params", "diff"], check=False)


def _report(args: argparse.Namespace) -> None:
    from distill_app.comparison.console import print_scores
    from distill_app.core.files import read_json

    print_scores(read_json(SCORES), REPORT)


_VERBS = {"ask": _ask, "profile": _profile, "report": _report}
