"""The comparison in the terminal: one table, the verdict, and where the report lies."""

import shutil
from collections.abc import Mapping, Set
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from distill_app.comparison.metrics import Metric, deciding_metrics, figure_of, show, show_both
from distill_app.comparison.names import MODELS, OUTCOMES, STUDENTS

WIDTH = 100  # columns; wider tables are harder to read, and logs are often cut here
# The intervals that the table shows, from the most to none: the first table that fits its width is printed.
INTERVALS = (
    {"loss", "chrf", "win_rate", "accuracy", "multi_step", "tokens_per_sec"},
    {"chrf", "win_rate", "accuracy", "multi_step"},
    {"chrf", "accuracy"},
    {"accuracy"},
    set[str](),
)


def print_comparison(comparison: Mapping[str, Any], report_path: str) -> None:
    """Print the five models' figures, the verdict under them, and the report's path."""
    # Without a terminal there is no width to ask for, and rich would take 80.
    width = min(WIDTH, shutil.get_terminal_size(fallback=(WIDTH, 24)).columns)
    console = Console(width=width, highlight=False)
    tables = [_table(comparison, intervals) for intervals in INTERVALS]
    console.print(next((table for table in tables if _width(table) <= width), tables[-1]))
    console.print()
    for verdict in comparison["verdicts"].values():
        head, *others = verdict["sentences"]
        outcome = OUTCOMES[verdict["outcome"]]
        console.print(Text(f"{outcome.sign} ", style=outcome.colour).append(head, style="bold"))
        for sentence in others:
            console.print(Padding(Text(sentence), (0, 0, 0, 2), expand=False))
    # A path is for copying: it stays on one line, and its brackets are not markup.
    console.print(Text(f"\nReport: {report_path}"), soft_wrap=True)


def _table(comparison: Mapping[str, Any], intervals: Set[str]) -> Table:
    asked = comparison["prompts"]
    title = f"{asked['instructions']} instructions and {asked['reasoning']} problems, held out"
    title += "; in brackets 95% intervals" if intervals else ""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column("", no_wrap=True)
    shown = deciding_metrics(comparison)
    for _, metric in shown:
        table.add_column(f"{metric.short} {metric.arrow}".strip(), justify="right", overflow="fold")
    for model, name in MODELS.items():
        figures = [(metric, figure_of(comparison, model, group, metric)) for group, metric in shown]
        cells = [_cell(metric, figure, intervals) for metric, figure in figures]
        table.add_row(name, *cells, style="bold" if model in STUDENTS else "")
    return table


def _width(table: Table) -> int:
    """Return the columns that the table takes where nothing of it is wrapped."""
    return Measurement.get(Console(width=1000), Console(width=1000).options, table).maximum


def _cell(metric: Metric, figure: Mapping[str, Any], intervals: Set[str]) -> Text:
    return Text(show_both(metric, figure) if metric.key in intervals else show(metric, figure))
