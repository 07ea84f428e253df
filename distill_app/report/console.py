"""The comparison in the terminal: a table a student, the verdict under it, and where the report lies."""

import shutil
from collections.abc import Mapping, Set
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from distill_app.evaluation.measures import Measure, show, show_both
from distill_app.evaluation.names import MODELS, OUTCOMES, STUDENTS, Student
from distill_app.report.tables import anchors_of, deciding_of, figure_of, models_of

WIDTH = 100  # columns; wider tables are harder to read, and logs are often cut here
# The intervals that a table shows, from all to none: the first table that fits its width is printed.
INTERVALS = (
    {"agreement", "free_nats", "wins", "accuracy", "accuracy_known", "accuracy_new", "multi_step", "seconds"},
    {"agreement", "wins", "accuracy", "accuracy_known", "accuracy_new", "multi_step"},
    {"agreement", "wins", "accuracy_known", "accuracy_new"},
    {"agreement"},
    set[str](),
)


def print_comparison(comparison: Mapping[str, Any], report_path: str) -> None:
    """Print of each student the figures that decide and the verdict, and the report's path."""
    # Without a terminal there is no width to ask for, and rich would take 80.
    width = min(WIDTH, shutil.get_terminal_size(fallback=(WIDTH, 24)).columns)
    console = Console(width=width, highlight=False)
    for name, student in STUDENTS.items():
        verdict = comparison["students"][name]
        if deciding_of(comparison, student):
            tables = [_table(comparison, name, student, intervals) for intervals in INTERVALS]
            console.print(next((table for table in tables if _width(table) <= width), tables[-1]))
            console.print()
        _say(console, verdict["headline"], sign=verdict["outcome"], style="bold")
        for check in verdict["checks"]:
            _say(console, check["sentence"], sign=check["outcome"], indent=2)
        for part in ("gain", "closed"):
            if verdict[part]:
                _say(console, verdict[part]["sentence"], indent=4)
        for note in verdict["notes"]:
            _say(console, note, indent=4, style="dim")
        console.print()
    # A path is for copying: it stays on one line, and its brackets are not markup.
    console.print(Text(f"Report: {report_path}"), soft_wrap=True)


def _say(console: Console, words: str, sign: str = "", indent: int = 0, style: str = "") -> None:
    """Print a sentence, wrapped and indented, after the sign of an outcome where there is one."""
    first = Text(" " * indent)
    if sign:
        first.append(f"{OUTCOMES[sign].sign} ", style=OUTCOMES[sign].colour)
    for line in Text(words, style=style).wrap(console, console.width - len(first)):
        line.rstrip()
        console.print(first + line)
        first = Text(" " * len(first))


def _table(comparison: Mapping[str, Any], name: str, student: Student, intervals: Set[str]) -> Table:
    title = f"{student.title}: {comparison['prompts'][student.task]} held-out {student.prompts_name}"
    table = Table(
        title=title + ("; in brackets 95% intervals" if intervals else ""),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column("", overflow="fold")
    shown = deciding_of(comparison, student)
    for measure in shown:
        table.add_column(f"{measure.short} {measure.arrow}".strip(), justify="right", overflow="fold")
    anchors = anchors_of(comparison, student.task, shown)
    for who, label in {**models_of(name, comparison), **anchors}.items():
        figures = [(measure, figure_of(comparison, who, student.task, measure.key)) for measure in shown]
        cells = [_cell(measure, figure, intervals) for measure, figure in figures]
        table.add_row(label, *cells, style="bold" if who == name else "dim" if who in anchors else "")
    return table


def _width(table: Table) -> int:
    """Return the columns that the table takes where nothing of it is wrapped."""
    return Measurement.get(Console(width=1000), Console(width=1000).options, table).maximum


def _cell(measure: Measure, figure: Mapping[str, Any], intervals: Set[str]) -> Text:
    return Text((show_both if measure.key in intervals else show)(measure.style, figure))


def outcome_line(comparison: Mapping[str, Any], report_path: str) -> str:
    """Return how the comparison ended, in one line."""
    told = (f"{MODELS[name]} {OUTCOMES[v['outcome']].says}" for name, v in comparison["students"].items())
    return f"{', '.join(told)}; the report is {report_path}, `distill report` prints it"
