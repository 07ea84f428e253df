"""The console command `distill`."""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from distill_app.core.stage import report_errors

if TYPE_CHECKING:
    from distill_app.labeling.store import Summary

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
    labels = verbs.add_parser(
        "labels", help="show what the store of the teacher's answers holds, or prune it"
    )
    labels.add_argument("--store", metavar="PATH", help="the store; else label.store of params.yaml")
    labels.add_argument("--prune", action="store_true", help="remove the recipes chosen by:")
    labels.add_argument("--recipe", metavar="ID", help="one recipe, as the table names it")
    labels.add_argument("--older-than", metavar="DAYS", type=float, help="recipes not used for so long")
    labels.add_argument(
        "--refused", action="store_true", help="what an engine refused, as after a server got more context"
    )
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


def _labels(args: argparse.Namespace) -> None:
    from distill_app.core.params import read_section
    from distill_app.labeling.params import LabelParams
    from distill_app.labeling.store import AnswerStore

    recipes_chosen = args.recipe is not None or args.older_than is not None
    if args.prune != (recipes_chosen or args.refused) or (recipes_chosen and args.refused):
        raise ValueError(
            "labels: --prune and a choice go together; add --prune, or --recipe or --older-than, or --refused"
        )
    if args.older_than is not None and args.older_than <= 0:
        raise ValueError(f"--older-than: found {args.older_than:g}, expected a number of days above 0")
    path = args.store or read_section("label", LabelParams).store
    with AnswerStore(path, must_exist=True) as store:
        if args.refused:
            print(f"{store.prune_refused()} refusals removed")
            return
        if args.prune:
            before = store.size_bytes()
            removed = store.prune(args.recipe, args.older_than)
            if removed:
                _print_recipes(removed, f"Removed from {path}")
            answers = sum(recipe.answers for recipe in removed)
            freed = _megabytes(before - store.size_bytes())
            print(f"{len(removed)} recipes and {answers} answers removed, {freed} freed")
            return
        recipes = store.summaries()
        _print_recipes(recipes, f"Answers in {path}")
        answers, tokens = sum(r.answers for r in recipes), sum(r.tokens for r in recipes)
        print(f"{answers} answers, {tokens} tokens, {_megabytes(store.size_bytes())}")
        for run in store.holders():
            print(f"in use by {run}")


def _print_recipes(recipes: Sequence["Summary"], title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("recipe", "teacher", "engine", "sampling"):
        table.add_column(name, overflow="fold")
    for name in ("answers", "tokens", "last used"):
        table.add_column(name, justify="right", no_wrap=True)
    for recipe in recipes:
        found = recipe.identity
        parts = (found.get("version", found.get("engine")), found.get("quantization"), found.get("endpoint"))
        engine = " ".join(str(part) for part in parts if part not in (None, "none"))
        used = datetime.fromtimestamp(recipe.used_at).strftime("%Y-%m-%d %H:%M")
        cells = (recipe.id, recipe.teacher, engine, _sampling_text(recipe.sampling))
        table.add_row(*map(Text, cells), f"{recipe.answers:,}", f"{recipe.tokens:,}", used)
    width = shutil.get_terminal_size(fallback=(120, 24)).columns
    Console(width=width, highlight=False).print(table)


def _sampling_text(sampling: dict[str, Any]) -> str:
    text = "greedy"
    if sampling["temperature"]:
        text = "temperature {temperature:g}, top_p {top_p:g}, seed {seed}".format(**sampling)
    return text if sampling["stop_at_eos"] else f"{text}, to the limit"


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


_VERBS = {"ask": _ask, "profile": _profile, "report": _report, "labels": _labels}
