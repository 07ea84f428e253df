"""`distill inspect`: a first look at a dataset, before it goes into params.yaml."""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_app.data.sources import Dataset

HELP = "show a dataset's columns, lengths and first rows, and the params that read it"
SHOWN_ROWS = 3
SHOWN_LETTERS = 160
LOOKED_AT = 1000  # rows
# Names that datasets give to what is asked and what is answered, the likeliest first
ASKED = ("instruction", "question", "problem", "prompt", "query", "input")
ANSWERED = ("output", "response", "answer", "solution", "completion", "cot", "generation", "target")


@dataclass
class Column:
    """What a column holds: how often each kind of value, and the lengths of texts and lists."""

    kinds: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)

    def see(self, value: Any) -> None:
        """Count one more value."""
        self.kinds["null" if value is None else type(value).__name__] += 1
        if isinstance(value, str | list):
            self.lengths.append(len(value))

    def spread(self) -> str:
        """Return the median, 95th percentile and greatest length; nothing where no value has one."""
        if not self.lengths:
            return ""
        ordered = sorted(self.lengths)
        return " / ".join(f"{ordered[int(share * (len(ordered) - 1))]:,}" for share in (0.5, 0.95, 1))


@dataclass(frozen=True)
class Look:
    """The first rows of a dataset, the columns of those that are objects, and the other rows' number."""

    rows: list[Any]
    columns: dict[str, Column]
    odd: int


def look_at(dataset: "Dataset") -> Look:
    """Return a look at the first rows of a slice, with the errors of `load_rows`."""
    from distill_app.data.sources import load_rows

    rows = list(islice(load_rows(dataset), LOOKED_AT))
    columns: dict[str, Column] = {}
    odd = 0
    for row in rows:
        if not isinstance(row, dict):
            odd += 1
            continue
        for name, value in row.items():
            columns.setdefault(name, Column()).see(value)
    return Look(rows, columns, odd)


def params_for(dataset: "Dataset", look: Look) -> dict[str, dict[str, Any]]:
    """Return params of a source for each prepare section that can read it, as far as names tell."""
    from distill_app.data.textfiles import CHAT_COLUMNS

    source = {"dataset": dataset.path, "revision": dataset.revision, "config": dataset.config}
    source["slice"] = dataset.slice
    texts = [name for name, column in look.columns.items() if column.kinds["str"]]
    found: dict[str, dict[str, Any]] = {}
    if {"question", "reasoning"} <= set(look.columns):
        return {"prepare_s2": {**source, "columns": {}}}
    if set(CHAT_COLUMNS) & set(look.columns) and not {"instruction", "problem"} & set(texts):
        return {name: {**source, "columns": {}} for name in ("prepare_s1", "prepare_s2")}
    asked, answered = _first(ASKED, texts), _first(ANSWERED, texts)
    if asked is not None:
        found["prepare_s1"] = {**source, "columns": _mapped({"instruction": asked, "output": answered})}
    if asked is not None and answered is not None:
        known = {"instruction": asked} if asked not in ("instruction", "question", "problem") else {}
        known |= {"output": answered} if answered not in ("cot", "output", "response") else {}
        found["prepare_s2"] = {**source, "columns": known}
    return found


def _first(names: Sequence[str], known: Sequence[str]) -> str | None:
    return next((name for name in names if name in known), None)


def _mapped(names: Mapping[str, str | None]) -> dict[str, str]:
    return {ours: theirs for ours, theirs in names.items() if theirs is not None and theirs != ours}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument("dataset", help="Hub id, or a local folder or file (Parquet, JSON, JSON lines, CSV)")
    parser.add_argument("--slice", default="train", help="rows, as `datasets` reads it; looked at are 1,000")
    parser.add_argument("--revision", metavar="NAME", help="commit, tag or branch of a Hub dataset")
    parser.add_argument("--config", metavar="NAME", help="one that the dataset has, such as main of gsm8k")


def run(args: argparse.Namespace) -> None:
    """Print the look."""
    import yaml

    from distill_app.data.sources import Dataset

    dataset = Dataset(args.dataset, args.slice, args.revision, args.config)
    look = look_at(dataset)
    _print_columns(look)
    for number, row in enumerate(look.rows[:SHOWN_ROWS]):
        print(f"\nrow {number}")
        for name, value in row.items() if isinstance(row, dict) else [("", row)]:
            print(f"  {name}: {_shortened(value)}")
    params = params_for(dataset, look)
    if params:
        print("\nIn params.yaml, if these guesses are right:")
        print(yaml.safe_dump(params, sort_keys=False, allow_unicode=True).rstrip())
    else:
        print("\nNo columns that look like a question and an answer; say in columns which ones are.")


def _print_columns(look: Look) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    odd = f", {look.odd} of them no objects" if look.odd else ""
    table = Table(box=SIMPLE, title=f"{len(look.rows):,} rows looked at{odd}", title_justify="left")
    for heading in ("column", "holds", "length: median / 95% / longest"):
        table.add_column(heading)
    for name, column in look.columns.items():
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in column.kinds.most_common())
        table.add_row(Text(name), kinds, column.spread())
    Console().print(table)


def _shortened(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_LETTERS else f"{line[:SHOWN_LETTERS]} ..."
