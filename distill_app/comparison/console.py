"""The comparison in the terminal: a table a system, the verdict, and where the report lies."""

import shutil
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill_app.comparison.report import METRICS, ROLES, SYSTEMS, show_figure, verdict

WIDTH = 100  # columns; wider tables are harder to read, and logs are often cut here


def print_scores(scores: dict[str, Any], report_path: str) -> None:
    """Print each system's figures, the verdict under them, and the report's path."""
    # Without a terminal there is no width to ask for, and rich would take 80.
    columns = shutil.get_terminal_size(fallback=(WIDTH, 24)).columns
    console = Console(width=min(WIDTH, columns), highlight=False)
    for system in SYSTEMS:
        console.print(_table(system, scores[system]))
    for sentence in verdict(scores):
        console.print(Text(sentence))
    # A path is for copying: it stays on one line, and its brackets are not markup.
    console.print(Text(f"\nReport: {report_path}"), soft_wrap=True)


def _table(system: str, found: dict[str, Any]) -> Table:
    title = f"{SYSTEMS[system].title}: {SYSTEMS[system].purpose}, {found['prompts']} prompts"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    for metric in METRICS[system]:
        table.add_column(f"{metric.short} {metric.arrow}".strip(), justify="right")
    for role, name in ROLES.items():
        figures = [show_figure(metric, found[role], found["prompts"]) for metric in METRICS[system]]
        table.add_row(name, *figures, style="bold" if role == "student" else "")
    return table
