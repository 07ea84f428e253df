"""The comparison as Markdown, for a pull request: as a file, or as the text of a comment."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from distill_app.comparison.metrics import (
    BENCHMARK,
    GROUPS,
    UNKNOWN,
    Group,
    deciding_metrics,
    figure_of,
    show_both,
    shown_metrics,
)
from distill_app.comparison.names import MODELS, OUTCOMES, STUDENTS
from distill_app.comparison.texts import clean


def render_markdown(comparison: Mapping[str, Any]) -> str:
    """Return verdict, figures and benchmarks in GitHub's Markdown; it links to nothing.

    The verdict and the measures that decide are open to the eye, all others folded.
    """
    lines = ["# Do the students replace their teacher?", ""]
    for verdict in comparison["verdicts"].values():
        lines += [*_verdict(verdict), ""]
    asked = comparison["prompts"]
    lines += ["## The five models", ""]
    lines += [*_deciding(comparison), ""]
    lines += [
        f"On {asked['instructions']} held-out instructions and {asked['reasoning']} held-out problems; in"
        " brackets 95% intervals. “Before” is a student as it was before distillation.",
        "",
    ]
    for group in GROUPS:
        if shown_metrics(comparison, group):
            lines += [*_folded(f"{group.title}, all figures", _figures(comparison, group)), ""]
    if comparison["benchmarks"]:
        lines += [*_folded("Benchmarks", _benchmarks(comparison)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _verdict(verdict: Mapping[str, Any]) -> Iterator[str]:
    head, *others = verdict["sentences"]
    yield f"**{OUTCOMES[verdict['outcome']].emoji} {_escaped(head)}**"
    yield ""
    for sentence in others:
        yield f"- {_escaped(sentence)}"


def _deciding(comparison: Mapping[str, Any]) -> Iterator[str]:
    shown = deciding_metrics(comparison)
    rows = []
    for model, name in MODELS.items():
        cells = [show_both(metric, figure_of(comparison, model, group, metric)) for group, metric in shown]
        row = [name, *cells]
        rows.append([f"**{cell}**" for cell in row] if model in STUDENTS else row)
    return _table(["", *(f"{metric.name} {metric.arrow}" for _, metric in shown)], rows)


def _figures(comparison: Mapping[str, Any], group: Group) -> Iterator[str]:
    rows = []
    for metric in shown_metrics(comparison, group):
        meaning = metric.meaning.format(batch=comparison["batch"])
        cells = [show_both(metric, figure_of(comparison, model, group, metric)) for model in MODELS]
        rows.append([f"{metric.name} {metric.arrow}".strip() + f"<br><sub>{meaning}</sub>", *cells])
    return _table(["", *MODELS.values()], rows)


def _benchmarks(comparison: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for task, found in comparison["benchmarks"].items():
        meaning = f"{_escaped(found['metric'])}, {found['questions']} questions"
        cells = [show_both(BENCHMARK, found["models"].get(model) or UNKNOWN) for model in MODELS]
        rows.append([f"{_escaped(task)}<br><sub>{meaning}</sub>", *cells])
    return _table(["", *MODELS.values()], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
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


def _escaped(text: str) -> str:
    """Return text as one line that Markdown shows as it is, without links or markup."""
    line = " ".join(clean(text).split())
    return re.sub(r"([\\`*_{}\[\]<>|#~&@]|://)", r"\\\1", line)
