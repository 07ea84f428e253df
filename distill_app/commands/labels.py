"""`distill labels`: what the store of the teacher's answers holds."""

import argparse
import shutil
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_app.labeling.store import Summary

HELP = "show what the store of the teacher's answers holds, compact or prune it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument("--store", metavar="PATH", help="the store; else label.store of params.yaml")
    parser.add_argument("--compact", action="store_true", help="make one file of those that no run writes to")
    parser.add_argument("--prune", action="store_true", help="remove the recipes chosen by:")
    parser.add_argument("--recipe", metavar="ID", help="one recipe, as the table names it")
    parser.add_argument("--older-than", metavar="DAYS", type=float, help="recipes not used for so long")
    parser.add_argument(
        "--refused", action="store_true", help="what an engine refused, as after a server got more context"
    )


def run(args: argparse.Namespace) -> None:
    """Print the store's table, or prune it and print what went."""
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
        if args.compact:
            store.compact()
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
        for segment in store.in_use():
            print(f"in use: {segment.name}")


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
