"""The comparison as a page: the verdict in words, the figures, and every answer side by side."""

import base64
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill_app.evaluation.measures import (
    BY_KEY,
    NOTHING,
    TASKS,
    UNKNOWN,
    Group,
    Measure,
    Style,
    is_known,
    show,
    show_interval,
    write,
)
from distill_app.evaluation.names import ANCHORS, MODELS, OUTCOMES, STUDENTS
from distill_app.evaluation.verdict import FEW
from distill_app.report.charts import COLOURS, Point, known_points, loss_chart, scale_chart
from distill_app.report.markdown import TITLES
from distill_app.report.tables import anchors_of, benchmark_style, figure_of, models_of, shown_of
from distill_app.report.texts import clean, differing

ALWAYS_FROM_ZERO = {"speedup", "multi_step", "win_rate"}
BENCHMARK = "benchmark:"  # how the key of a benchmark's check begins
EXCERPT = 110  # characters of a text on the first screen


class Task(NamedTuple):
    """A task: its title, the student made for it, and what answers are held against."""

    title: str
    student: str
    against: str  # "teacher" or "reference"
    kinds: dict[str, str]  # what prompts can be chosen by, with "{}" for the student's name


LISTS = {
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
            "known": "Frame known to training",
            "new": "Frame new",
            "unchanged": "{} unchanged by distillation",
            "cut": "{} cut at the token limit",
            "refused": "Too long for {}",
        },
    ),
}


def render_page(
    comparison: Mapping[str, Any],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    curves: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]],
    provenance: Mapping[str, Any],
) -> str:
    """Return the report as one HTML page that loads nothing.

    Args:
        comparison: as comparison.json holds it.
        answers: a task's prompts, each with the reference and the scored answers of its models.
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
    rows = {task: clean(list(answers[task])) for task in LISTS}
    return environment.get_template("page.html.jinja").render(
        verdicts=[_verdict(name, comparison, rows) for name in STUDENTS],
        prompts=comparison["prompts"],
        slices=[_slices(name, comparison["students"][name]["slices"]) for name in STUDENTS],
        groups=[_group(comparison, group) for group in (*TASKS, "size") if shown_of(comparison, group)],
        tasks=[_task(key, rows[key], comparison) for key in LISTS],
        few=FEW,
        has_floor=any(
            point["role"] == "floor"
            for found in comparison["students"].values()
            for check in found["checks"]
            for point in (check["scale"] or {"points": ()})["points"]
        ),
        models=_shown_models(comparison),
        benchmarks=_benchmarks(clean(comparison["benchmarks"]), _shown_models(comparison)),
        losses=[(MODELS[name], _loss_chart(name, curves.get(name, {}))) for name in STUDENTS],
        provenance=list(_flatten(clean(provenance))),
    )


def _verdict(
    name: str, comparison: Mapping[str, Any], rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    found = clean(comparison["students"][name])
    task = STUDENTS[name].task
    return {
        "title": MODELS[name],
        "outcome": found["outcome"],
        "says": _says(found["outcome"]),
        "head": found["headline"],
        "checks": [_check(name, comparison, check) for check in found["checks"]],
        "gain": found["gain"],
        "more": [found["closed"]["sentence"]] if found["closed"] else [],
        "notes": found["notes"],
        "cost": list(_cost(comparison, name)),
        "examples": [
            _example(title, rows[task][found[kind]], name)
            for kind, title in (("best", "One of its best"), ("worst", "One of its worst"))
            if found[kind] is not None and found[kind] < len(rows[task])
        ],
    }


def _check(student: str, comparison: Mapping[str, Any], check: Mapping[str, Any]) -> dict[str, Any]:
    from markupsafe import Markup

    scale = _scale(student, comparison, check)
    points = [point for point in scale.points if is_known(point["figure"]["value"])]
    drawn = [
        Point(
            point["role"],
            _short(student, point),
            point["figure"]["value"],
            show(scale.style, point["figure"]),
            (point["figure"]["low"], point["figure"]["high"]),
        )
        for point in points
    ]
    words = [f"{point['label']} {show(scale.style, point['figure'])}" for point in points]
    if drawn and scale.target is not None:
        goal = write(scale.style, scale.target)
        drawn.append(Point("target", "target", scale.target, goal))
        words.append(f"target {goal}")
    from_zero = check["key"] in ALWAYS_FROM_ZERO
    outcome = OUTCOMES[check["outcome"]]
    return {
        "name": check["name"],
        "is_benchmark": check["key"].startswith(BENCHMARK),
        "outcome": check["outcome"],
        "sign": outcome.sign,
        "says": outcome.says,
        "sentence": check["sentence"],
        "label": f"{check['name']} of {MODELS[student]}: {', '.join([*words, outcome.says])}",
        "svg": Markup(scale_chart(drawn, COLOURS[student], from_zero, scale.falls)) if drawn else "",
    }


class Scale(NamedTuple):
    """What a check's picture shows, all of it on the measure's own scale."""

    points: list[Mapping[str, Any]]
    target: float | None
    style: Style
    falls: bool = False  # less is better


def _scale(student: str, comparison: Mapping[str, Any], check: Mapping[str, Any]) -> Scale:
    """Return the points of a check's picture, and its target where that lies between them.

    A target that is a share of the way, or points below the teacher, is put where it lies on the measure's
    own scale.
    """
    key, target = check["key"], check["target"]
    if check["scale"]:
        measure, points = BY_KEY[check["scale"]["measure"]], check["scale"]["points"]
        at = {point["role"]: point["figure"]["value"] for point in points}
        at = {role: value for role, value in at.items() if is_known(value)}
        target = None
        if check["style"] == "points" and "ceiling" in at:
            target = at["ceiling"] + check["target"]
        elif "floor" in at and "ceiling" in at:
            target = at["floor"] + check["target"] * (at["ceiling"] - at["floor"])
        return Scale(points, target, measure.style, measure.better == "lower")
    if key.startswith(BENCHMARK):
        result = comparison["benchmarks"][key.removeprefix(BENCHMARK)]
        rises, figures = result.get("higher_is_better", True), result["models"]
        points = _models(student, lambda who: figures.get(who) or UNKNOWN)
        teachers = (figures.get("teacher") or UNKNOWN)["value"]
        lost = target if rises else -target
        least = teachers + lost if teachers is not None and is_known(teachers) else None
        return Scale(points, least, benchmark_style(result), not rises)
    if key in BY_KEY:
        task = STUDENTS[student].task
        points = _models(student, lambda who: figure_of(comparison, who, task, key))
        return Scale(points, target, check["style"])
    points = [{"label": MODELS[student], "role": "student", "figure": check["found"]}]
    if key == "speedup" and is_known(check["found"]["value"]):
        points.append({"label": MODELS["teacher"], "role": "ceiling", "figure": {**UNKNOWN, "value": 1.0}})
    return Scale(points, target, check["style"])


def _models(student: str, figure: Callable[[str], Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return a student, itself before and its teacher as the points of a scale."""
    roles = {f"{student}_before": "before", student: "student", "teacher": "ceiling"}
    return [{"label": MODELS[who], "role": role, "figure": figure(who)} for who, role in roles.items()]


def _short(student: str, point: Mapping[str, Any]) -> str:
    """Return what a point is called in a picture, where there is room for a word or two."""
    if point["role"] == "student":
        return MODELS[student]
    return point["label"] if point["label"] == MODELS["teacher"] else point["role"]


def _cost(comparison: Mapping[str, Any], name: str) -> Iterator[tuple[str, str, str]]:
    """Yield what an answer costs, by student and teacher: name, the student's figure, the teacher's."""
    task = STUDENTS[name].task
    groups: tuple[tuple[Group, tuple[str, ...]], ...] = (
        (task, ("seconds", "length")),
        ("size", ("memory", "parameters")),
    )
    for group, keys in groups:
        for key in keys:
            one, other = (figure_of(comparison, who, group, key) for who in (name, "teacher"))
            if is_known(one["value"]):
                style = BY_KEY[key].style
                yield BY_KEY[key].name, show(style, one), show(style, other)


def _example(title: str, row: Mapping[str, Any], name: str) -> dict[str, str]:
    against = LISTS[STUDENTS[name].task].against
    other = row["reference"] if against == "reference" else row["teacher"]["text"]
    return {
        "title": title,
        "prompt": _excerpt(row["prompt"]),
        "student": _excerpt(row[name]["text"]) or "(nothing)",
        "against": against.capitalize(),
        "other": _excerpt(other),
    }


def _excerpt(text: str) -> str:
    """Return a text in one line; of a long one the start and the end, for a solution's answer stands last."""
    line = " ".join(text.split())
    if len(line) <= EXCERPT:
        return line
    head, tail = line[: EXCERPT * 2 // 3], line[-EXCERPT // 3 :]
    # A cut goes back to the space before it, if one is near: else a long word would be lost whole.
    return f"{head.rsplit(' ', 1)[0]} … {tail.split(' ', 1)[-1]}"


def _says(outcome: str) -> str:
    return f"{OUTCOMES[outcome].sign} {OUTCOMES[outcome].says}"


def _slices(name: str, slices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a student's main measure by length and kind of prompt, a row a slice."""
    columns = list(dict.fromkeys(who for part in slices for who in part["figures"]))
    measure = BY_KEY[slices[0]["measure"]] if slices else BY_KEY[STUDENTS[name].gain]
    titles = {**MODELS, **ANCHORS}
    return {
        "title": MODELS[name],
        "student": name,
        "measure": measure.name,
        "columns": [(who, titles[who]) for who in columns],
        "rows": [
            {
                "name": f"{part['by']}: {part['name']}",
                "prompts": part["prompts"],
                "cells": [
                    (show(measure.style, figure), show_interval(measure.style, figure))
                    for figure in (part["figures"].get(who) or UNKNOWN for who in columns)
                ],
            }
            for part in slices
        ],
    }


def _group(comparison: Mapping[str, Any], group: Group) -> dict[str, Any]:
    measures = shown_of(comparison, group)
    asked = comparison["prompts"].get(group)
    models = _columns(comparison, group, measures)
    return {
        "title": TITLES[group],
        "asked": f"{asked} held-out prompts" if asked else "of each model",
        "models": list(models.items()),
        "rows": [
            {
                "measure": measure,
                "cells": [
                    (show(measure.style, figure), show_interval(measure.style, figure))
                    for figure in (figure_of(comparison, who, group, measure.key) for who in models)
                ],
            }
            for measure in measures
        ],
    }


def _columns(comparison: Mapping[str, Any], group: Group, measures: Sequence[Measure]) -> dict[str, str]:
    """Return the models that have a figure of the group, and the floors and ceilings of its measures."""
    found = {
        who: title
        for who, title in MODELS.items()
        if any(is_known(figure_of(comparison, who, group, measure.key)["value"]) for measure in measures)
    }
    return found | anchors_of(comparison, group, measures)


def _loss_chart(student: str, curves: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any] | None:
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
    label = f"{MODELS[student]}: {'; '.join(said)}"
    return {"label": label, "svg": Markup(loss_chart(curves, COLOURS[student]))}


def _shown_models(comparison: Mapping[str, Any]) -> dict[str, str]:
    """Return the models that were asked, each with its title."""
    return {who: title for who, title in MODELS.items() if comparison["models"].get(who)}


def _benchmarks(found: Mapping[str, Any], models: Iterable[str]) -> list[dict[str, Any]]:
    rows = []
    for task, result in found.items():
        style = benchmark_style(result)
        chance = f", chance {write(style, result['chance'])}" if result.get("chance") else ""
        figures = [result["models"].get(model) or UNKNOWN for model in models]
        rows.append(
            {
                "name": task,
                "meaning": f"{result['metric']}, {result['questions']} questions{chance}",
                "cells": [(show(style, figure), show_interval(style, figure)) for figure in figures],
            }
        )
    return rows


def _task(key: str, rows: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any]) -> dict[str, Any]:
    task = LISTS[key]
    models = models_of(task.student, comparison)
    worst_first = sorted(rows, key=lambda row: -1.0 if row["score"] is None else row["score"])
    prompts = [_prompt(row, task, models) for row in worst_first]
    counts = {kind: sum(kind in prompt["kinds"] for prompt in prompts) for kind in task.kinds}
    return {
        "id": key,
        "title": task.title,
        "student": task.student,
        "against": task.against,
        "is_judged": key == "reasoning",
        "order": "Wrong answers first." if key == "reasoning" else "Least like its teacher first.",
        "kinds": [
            (kind, f"{label.format(MODELS[task.student])} ({counts[kind]})")
            for kind, label in task.kinds.items()
        ],
        "models": list(models.items()),
        "rows": prompts,
    }


def _prompt(row: Mapping[str, Any], task: Task, models: Iterable[str]) -> dict[str, Any]:
    """Return a prompt with its answers, each in pieces of text that say whether they differ."""
    against = row["reference"] if task.against == "reference" else row["teacher"]["text"]
    answers = {}
    for model in models:
        text = row[model]["text"]
        pieces, shared = ([(text, False)], None) if model == task.against else differing(text, against)
        answers[model] = {"judged": {}, **row[model], "pieces": pieces, "shared": shared}
    return {
        "prompt": row["prompt"],
        "reference": row["reference"],
        "answers": answers,
        "agreed": write("percent", row[task.student]["agreed"]) if "agreed" in row[task.student] else "",
        "kinds": list(_kinds(row, task.student)),
    }


def _kinds(row: Mapping[str, Any], student: str) -> Iterator[str]:
    """Yield what the prompt can be chosen by: how the student did, beside its own start and the teacher."""
    now, before, teacher = row[student], row[f"{student}_before"], row["teacher"]
    yield "same" if _words(now) == _words(teacher) else "other"
    if _words(now) == _words(before):
        yield "unchanged"
    yield from (kind for kind in ("cut", "refused") if now[kind])
    if "known" in row:
        yield "known" if row["known"] else "new"
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
