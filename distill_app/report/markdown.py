"""The comparison as Markdown, for a pull request: as a file, or as the text of a comment."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from distill_app.evaluation.measures import TASKS, UNKNOWN, Group, Measure, show_both
from distill_app.evaluation.names import MODELS, OUTCOMES, STUDENTS
from distill_app.report.tables import anchors_of, benchmark_style, deciding_of, figure_of, models_of, shown_of
from distill_app.report.texts import clean

TITLES: dict[Group, str] = {
    "instructions": "Following instructions",
    "reasoning": "Reasoning",
    "size": "Memory and size",
}


def render_markdown(comparison: Mapping[str, Any]) -> str:
    """Return verdict, figures and benchmarks in GitHub's Markdown; it links to nothing.

    The verdict and the measures that decide are open to the eye, all others folded.
    """
    lines = ["# Can the students replace their teacher?", ""]
    for name in STUDENTS:
        lines += [*_verdict(comparison["students"][name]), "", *_deciding(comparison, name)]
    asked = comparison["prompts"]
    lines += [
        f"On {asked['instructions']} held-out instructions and {asked['reasoning']} held-out problems; in"
        " brackets 95% intervals. “Before” is a student as it was before distillation.",
        "",
    ]
    for group in (*TASKS, "size"):
        if shown_of(comparison, group):
            lines += [*_folded(f"{TITLES[group]}, all figures", _figures(comparison, group)), ""]
    if comparison["benchmarks"]:
        lines += [*_folded("Benchmarks", _benchmarks(comparison)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _verdict(verdict: Mapping[str, Any]) -> Iterator[str]:
    yield f"**{OUTCOMES[verdict['outcome']].emoji} {escaped(verdict['headline'])}**"
    yield ""
    for check in verdict["checks"]:
        yield f"- {OUTCOMES[check['outcome']].emoji} {escaped(check['sentence'])}"
    for part in ("gain", "closed"):
        if verdict[part]:
            yield f"- {escaped(verdict[part]['sentence'])}"
    for note in verdict["notes"]:
        yield f"- {escaped(note)}"


def _deciding(comparison: Mapping[str, Any], name: str) -> Iterator[str]:
    student = STUDENTS[name]
    shown = deciding_of(comparison, student)
    rows = []
    for who, title in {**models_of(name, comparison), **anchors_of(comparison, student.task, shown)}.items():
        cells = [show_both(m.style, figure_of(comparison, who, student.task, m.key)) for m in shown]
        row = [title, *cells]
        rows.append([f"**{cell}**" for cell in row] if who == name else row)
    if shown:
        yield from table(["", *(_head(measure) for measure in shown)], rows)
        yield ""


def _head(measure: Measure) -> str:
    return f"{measure.name} {measure.arrow}".strip()


def _figures(comparison: Mapping[str, Any], group: Group) -> Iterator[str]:
    rows = []
    shown = shown_of(comparison, group)
    models = {
        who: title
        for who, title in MODELS.items()
        if any(figure_of(comparison, who, group, measure.key) is not UNKNOWN for measure in shown)
    }
    for measure in shown:
        cells = [show_both(measure.style, figure_of(comparison, who, group, measure.key)) for who in models]
        rows.append([f"{_head(measure)}<br><sub>{measure.meaning}</sub>", *cells])
    return table(["", *models.values()], rows)


def _benchmarks(comparison: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for task, found in comparison["benchmarks"].items():
        meaning = f"{escaped(found['metric'])}, {found['questions']} questions"
        style = benchmark_style(found)
        cells = [show_both(style, found["models"].get(model) or UNKNOWN) for model in MODELS]
        rows.append([f"{escaped(task)}<br><sub>{meaning}</sub>", *cells])
    return table(["", *MODELS.values()], rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table of cells that are Markdown already."""
    yield "| " + " | ".join(head) + " |"
    yield "|---" + "|---:" * (len(head) - 1) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _folded(title: str, lines: Iterable[str]) -> Iterator[str]:
    # Without the empty lines GitHub would take the table for HTML.
    yield f"<details><summary>{title}</summary>"
    yield ""
    yield from lines
    yield ""
    yield "</details>"


def escaped(text: str) -> str:
    """Return text as one line that Markdown shows as it is, without links or markup."""
    line = " ".join(clean(text).split())
    return re.sub(r"([\\`*_{}\[\]<>|#~&@]|://)", r"\\\1", line)
