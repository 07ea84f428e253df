"""The comparison as a page: the verdict in words, the figures, and every answer side by side."""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill_app.comparison.charts import COLOURS, Bar, bar_chart, goal_chart, known_points, loss_chart
from distill_app.comparison.metrics import (
    BENCHMARK,
    CHECKS,
    GROUPS,
    NOTHING,
    UNKNOWN,
    Group,
    Metric,
    figure_of,
    show,
    show_both,
    show_interval,
    shown_metrics,
)
from distill_app.comparison.names import MODELS, OUTCOMES, STUDENTS
from distill_app.comparison.texts import clean, differing
from distill_app.comparison.verdict import FEW


class Task(NamedTuple):
    """A task: its title, the student made for it, and what answers are held against."""

    title: str
    student: str
    against: str  # "teacher" or "reference"
    kinds: dict[str, str]  # what prompts can be chosen by, with "{}" for the student's name


TASKS = {
    "instructions": Task(
        "Instructions",
        "system1",
        "teacher",
        {
            "same": "{} says what the teacher says",
            "other": "{} says something else than the teacher",
            "unchanged": "{} unchanged by distillation",
            "cut": "{} cut at the token limit",
            "refused": "Too long for {}",
        },
    ),
    "reasoning": Task(
        "Problems",
        "system2",
        "reference",
        {
            "right": "{} right",
            "wrong": "{} wrong",
            "gained": "{} right since distillation",
            "lost": "{} wrong since distillation",
            "ahead": "{} right, teacher wrong",
            "behind": "{} wrong, teacher right",
            "unchanged": "{} unchanged by distillation",
            "cut": "{} cut at the token limit",
            "refused": "Too long for {}",
        },
    ),
}


def render_report(
    comparison: Mapping[str, Any],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    curves: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]],
    provenance: Mapping[str, Any],
) -> str:
    """Return the report as one HTML page that loads nothing.

    Args:
        comparison: as comparison.json holds it.
        answers: a task's prompts, each with the reference and the answers of the five models.
        curves: a student's losses by step, "train" and "validation"; may be empty.
        provenance: what produced the models and the figures, nested as deep as you like.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["csp_hash"] = _csp_hash
    return environment.get_template("report.html.jinja").render(
        verdicts=[_verdict(name, comparison["verdicts"][name]) for name in STUDENTS],
        prompts=comparison["prompts"],
        groups=[_group(comparison, group) for group in GROUPS if shown_metrics(comparison, group)],
        tasks=[_task(key, answers[key]) for key in TASKS],
        models=MODELS,
        few=FEW,
        benchmarks=_benchmarks(clean(comparison["benchmarks"])),
        losses=[(MODELS[name], _loss_chart(MODELS[name], curves.get(name, {}))) for name in STUDENTS],
        provenance=list(_flatten(clean(provenance))),
    )


def _verdict(name: str, verdict: Mapping[str, Any]) -> dict[str, Any]:
    head, *sentences = verdict["sentences"]
    return {
        "title": MODELS[name],
        "outcome": verdict["outcome"],
        "says": _says(verdict["outcome"]),
        "head": head,
        "sentences": sentences[len(verdict["checks"]) :],  # those before say what the table of checks says
        "checks": [_check(name, check) for check in verdict["checks"]],
    }


def _check(student: str, check: Mapping[str, Any]) -> dict[str, Any]:
    from markupsafe import Markup

    metric, found, says = CHECKS[check["name"]], check["found"], _says(check["outcome"])
    wanted = metric.write(check["wanted"])
    colour = COLOURS[MODELS[student]]
    return {
        "metric": metric,
        "found": show(metric, found),
        "interval": show_interval(metric, found),
        "wanted": wanted,
        "outcome": check["outcome"],
        "says": says,
        "label": f"{metric.name} of {MODELS[student]}: {show_both(metric, found)}, wanted {wanted}, {says}",
        "svg": Markup(goal_chart(found, check["wanted"], f"wanted {wanted}", colour)),
    }


def _says(outcome: str) -> str:
    return f"{OUTCOMES[outcome].sign} {OUTCOMES[outcome].says}"


def _group(comparison: Mapping[str, Any], group: Group) -> dict[str, Any]:
    metrics = shown_metrics(comparison, group)
    asked = comparison["prompts"].get(group.key)
    return {
        "title": group.title,
        "asked": f"{asked} held-out prompts" if asked else "equal work for every model",
        "rows": [
            {
                "metric": metric,
                "meaning": metric.meaning.format(batch=comparison["batch"]),
                "cells": [
                    (show(metric, figure), show_interval(metric, figure))
                    for figure in (figure_of(comparison, model, group, metric) for model in MODELS)
                ],
            }
            for metric in metrics
        ],
        "charts": [_metric_chart(comparison, group, metric) for metric in metrics if metric.charted],
    }


def _metric_chart(comparison: Mapping[str, Any], group: Group, metric: Metric) -> dict[str, Any]:
    from markupsafe import Markup

    bars, said = [], []
    for model, name in MODELS.items():
        figure = figure_of(comparison, model, group, metric)
        bars.append(Bar(name, figure["value"], show(metric, figure), (figure["low"], figure["high"])))
        said.append(f"{name} {show_both(metric, figure)}")
    label = ", ".join(filter(None, [metric.name, metric.direction])) + f": {', '.join(said)}"
    return {"metric": metric, "label": label, "svg": Markup(bar_chart(bars))}


def _loss_chart(title: str, curves: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any] | None:
    from markupsafe import Markup

    said = []
    for key, name in (("train", "training"), ("validation", "held-out")):
        if points := known_points(curves.get(key, ())):
            first, last = (
                f"{point['loss']:.2f} at step {point['step']}" for point in (points[0], points[-1])
            )
            said.append(f"{name} loss from {first} to {last}")
    if not said:
        return None
    return {"label": f"{title}: {'; '.join(said)}", "svg": Markup(loss_chart(curves, COLOURS[title]))}


def _benchmarks(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": task,
            "meaning": f"{result['metric']}, {result['questions']} questions"
            + (f", chance {result['chance']:.3g}" if result.get("chance") else ""),
            "cells": [
                (show(BENCHMARK, figure), show_interval(BENCHMARK, figure))
                for figure in (result["models"].get(model) or UNKNOWN for model in MODELS)
            ],
        }
        for task, result in found.items()
    ]


def _task(key: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    task = TASKS[key]
    prompts = [_prompt(row, task) for row in clean(rows)]
    counts = {kind: sum(kind in prompt["kinds"] for prompt in prompts) for kind in task.kinds}
    return {
        "id": key,
        "title": task.title,
        "student": task.student,
        "against": task.against,
        "is_judged": key == "reasoning",
        "kinds": [
            (kind, f"{label.format(MODELS[task.student])} ({counts[kind]})")
            for kind, label in task.kinds.items()
        ],
        "rows": prompts,
    }


def _prompt(row: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Return a prompt with its answers, each in pieces of text that say whether they differ."""
    wanted = row["reference"] if task.against == "reference" else row["teacher"]["text"]
    answers = {}
    for model in MODELS:
        text = row[model]["text"]
        pieces, shared = ([(text, False)], None) if model == task.against else differing(text, wanted)
        answers[model] = {**row[model], "pieces": pieces, "shared": shared}
    return {
        "prompt": row["prompt"],
        "reference": row["reference"],
        "answers": answers,
        "kinds": list(_kinds(row, task.student)),
    }


def _kinds(row: Mapping[str, Any], student: str) -> Iterator[str]:
    """Yield what the prompt can be chosen by: how the student did, beside its own start and the teacher."""
    now, before, teacher = row[student], row[f"{student}_before"], row["teacher"]
    yield "same" if _words(now) == _words(teacher) else "other"
    if _words(now) == _words(before):
        yield "unchanged"
    yield from (kind for kind in ("cut", "refused") if now[kind])
    if now.get("right") is None:  # no problem, or one whose reference cannot be read
        return
    yield "right" if now["right"] else "wrong"
    if now["right"] != before["right"]:
        yield "gained" if now["right"] else "lost"
    if now["right"] != teacher["right"]:
        yield "ahead" if now["right"] else "behind"


def _words(answer: Mapping[str, Any]) -> list[str]:
    return str(answer["text"]).split()


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted path, text) for every leaf of a nested dict; an empty one is a leaf too."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        yield path, ", ".join(map(str, value)) or NOTHING
    else:
        yield path, NOTHING if value is None or value == {} else str(value)


def _csp_hash(script: str) -> str:
    """Return the source expression that lets this very inline script run, and no other."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest())
    return f"sha256-{digest.decode()}"
