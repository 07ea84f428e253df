"""The comparison as a page: the verdict in words, the figures, and every answer side by side."""

import base64
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill_app.comparison.charts import Bar, bar_chart, is_number, loss_chart

ROLES = {"teacher": "Teacher", "before": "Before", "student": "Student"}
NOTHING = "–"
FEW_PROMPTS = 100  # below this the verdict says that small differences can be chance
Z_95 = 1.96  # standard normal quantile of a two-sided 95 % interval


class System(NamedTuple):
    """How a system is named to a reader."""

    title: str
    purpose: str


class Metric(NamedTuple):
    """One measure: its names, what it counts, which way is better, and how its figures are written."""

    key: str
    name: str
    short: str
    meaning: str
    arrow: str  # ↑ higher is better, ↓ lower is better, empty where neither is
    write: Callable[[float], str]
    charted: bool = True

    @property
    def direction(self) -> str:
        """Return the arrow in words."""
        return {"↑": "higher is better", "↓": "lower is better"}.get(self.arrow, "")


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _speed(rate: float) -> str:
    return f"{rate:.0f} tokens/s" if rate >= 10 else f"{rate:.1f} tokens/s"


def _count(number: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _size(size_bytes: float) -> str:
    if size_bytes >= 1e9:
        return f"{size_bytes / 1e9:.1f} GB"
    return f"{size_bytes / 1e6:.0f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.0f} kB"


SYSTEMS = {
    "system1": System("System 1", "instruction following"),
    "system2": System("System 2", "step-by-step reasoning"),
}
COSTS = (
    Metric("tokens_per_sec", "Speed", "speed", "several prompts at once, equal lengths", "↑", _speed),
    Metric(
        "latency_sec",
        "Latency",
        "latency",
        "one prompt alone, equal lengths",
        "↓",
        "{:.2f} s".format,
    ),
    Metric("parameters", "Parameters", "params", "weights in the model", "↓", _count, False),
    Metric("bytes", "Size", "size", "of the weights", "↓", _size, False),
)
METRICS = {
    "system1": (
        Metric("loss", "Loss", "loss", "nats per token of the teacher's answers", "↓", "{:.2f}".format),
        Metric("chrf", "chrF", "chrF", "overlap with the teacher, 0–100", "↑", "{:.1f}".format),
        *COSTS,
    ),
    "system2": (
        Metric("accuracy", "Right answers", "right", "with 95% interval", "↑", _percent),
        Metric("multi_step", "In several steps", "in steps", "answers of over one step", "↑", _percent),
        Metric("cut", "Cut answers", "cut", "stopped at the token limit", "↓", _percent, False),
        *COSTS,
    ),
}


def render_report(
    scores: Mapping[str, Any],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    losses: Mapping[str, Sequence[Mapping[str, float]]],
    provenance: Mapping[str, Any],
) -> str:
    """Return the report as one HTML page that loads nothing.

    Args:
        scores: a system's figures for each role, and how many prompts it was asked.
        answers: a system's prompts, each with the reference and the answer of each role.
        losses: a system's training loss by step; may be empty.
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
        verdict=verdict(scores),
        warnings=list(_overlaps(provenance)),
        systems=[_system(key, scores[key], answers[key], losses[key]) for key in SYSTEMS],
        roles=ROLES,
        provenance=list(_flatten(_clean(provenance))),
    )


def verdict(scores: Mapping[str, Any]) -> list[str]:
    """Return the shortest honest reading of the figures: three sentences, or four of a small sample."""
    sentences = [
        _instructions_verdict(scores["system1"]),
        _reasoning_verdict(scores["system2"]),
        _cost_verdict(scores),
    ]
    few = [
        f"{scores[key]['prompts']} ({system.title})"
        for key, system in SYSTEMS.items()
        if scores[key]["prompts"] < FEW_PROMPTS
    ]
    if few:
        asked = " and ".join(few)
        sentences.append(f"Only {asked} prompts were asked, so small differences can be chance.")
    return sentences


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `count` yes-or-no results; (0, 1) where there are none.

    Source: Wilson 1927; it keeps its coverage near 0 and 1 and with few results.
    """
    if count == 0:
        return 0.0, 1.0
    spread = Z_95**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def show_figure(metric: Metric, figures: Mapping[str, Any], prompts: int) -> str:
    """Return a figure with its unit, an accuracy with its interval, and "–" for what is not known."""
    value = figures.get(metric.key)
    if value is None or not is_number(value):
        return NOTHING
    if metric.key != "accuracy":
        return metric.write(value)
    return f"{metric.write(value)} ({_interval_text(value, prompts)})"


def _interval_text(share: float, count: int) -> str:
    low, high = wilson_interval(share, count)
    return f"{100 * low:.0f}–{100 * high:.0f}%"


def _instructions_verdict(found: Mapping[str, Any]) -> str:
    loss, chrf = METRICS["system1"][:2]
    changes = {_change(loss, found), _change(chrf, found)} - {0}
    claim = {
        frozenset({1}): "is closer to the teacher after distillation",
        frozenset({-1}): "is further from the teacher after distillation",
        frozenset({1, -1}): "is closer to the teacher by one measure and further by the other",
    }.get(frozenset(changes), "is no closer to the teacher after distillation")
    teacher = show_figure(loss, found["teacher"], 0)
    return (
        f"System 1 {claim}: loss per token {_then_and_now(loss, found)} (teacher {teacher}); "
        f"chrF {_then_and_now(chrf, found)}."
    )


def _change(metric: Metric, found: Mapping[str, Any]) -> int:
    """Return 1 for better than before, -1 for worse, 0 where the written figures are the same."""
    before, student = found["before"].get(metric.key), found["student"].get(metric.key)
    if not (is_number(before) and is_number(student)):
        return 0
    if metric.write(before) == metric.write(student):
        return 0
    return 1 if (student > before) == (metric.arrow == "↑") else -1


def _then_and_now(metric: Metric, found: Mapping[str, Any]) -> str:
    before, now = (show_figure(metric, found[role], 0) for role in ("before", "student"))
    return f"{now}, as before" if before == now else f"{now}, was {before}"


def _reasoning_verdict(found: Mapping[str, Any]) -> str:
    student, before = found["student"]["accuracy"], found["before"]["accuracy"]
    count = found["prompts"]
    change = _change(METRICS["system2"][0], found)
    word = "better" if change > 0 else "worse"
    if change == 0:
        claim = "is no better after distillation"
    elif _is_beyond_chance(before, student, count):
        claim = f"is {word} after distillation"
    else:
        claim = f"may be {word} after distillation, but {count} problems are too few to tell"
    then = "as before" if change == 0 else f"was {_percent(before)}"
    return (
        f"System 2 {claim}: it answers {_percent(student)} of {count} held-out problems right "
        f"(95% interval {_interval_text(student, count)}), {then}; "
        f"the teacher answers {_percent(found['teacher']['accuracy'])}{_cut_clause(found['student'])}."
    )


def _cut_clause(student: Mapping[str, Any]) -> str:
    # Under a tenth, the limit explains little of the accuracy.
    if student["cut"] < 0.1:
        return ""
    return f"; {_percent(student['cut'])} of System 2's answers were cut at the token limit"


def _is_beyond_chance(first: float, second: float, count: int) -> bool:
    """Tell whether the 95 % interval of the difference of two shares leaves out zero.

    Source: Newcombe 1998, method 10, from two Wilson intervals. It takes the samples as independent;
    on the same prompts it errs towards "cannot tell".
    """
    small, large = min(first, second), max(first, second)
    below = large - wilson_interval(large, count)[0]
    above = wilson_interval(small, count)[1] - small
    return large - small > math.hypot(below, above)


def _cost_verdict(scores: Mapping[str, Any]) -> str:
    parts = []
    for key, system in SYSTEMS.items():
        speed = _ratio(scores[key], "tokens_per_sec")
        times = NOTHING if speed is None else f"{speed:.1f}×"
        slower = " (slower)" if speed is not None and round(speed, 1) < 1 else ""
        size = _ratio(scores[key], "parameters")
        share = NOTHING if size is None else _percent(size)
        parts.append(f"{system.title} runs at {times}{slower} with {share} of the parameters")
    return f"Measured against the teacher's speed and size, {'; '.join(parts)}."


def _ratio(found: Mapping[str, Any], key: str) -> float | None:
    """Return the student's figure over the teacher's; None where either is unknown or zero."""
    student, teacher = found["student"].get(key), found["teacher"].get(key)
    return student / teacher if student and teacher else None


def _overlaps(provenance: Mapping[str, Any]) -> Iterator[str]:
    for key, system in SYSTEMS.items():
        shared = provenance.get("overlap", {}).get(key)
        if shared:
            yield (
                f"{shared} of {system.title}'s held-out prompts are also in its training data: "
                "its figures flatter it."
            )


def _system(
    key: str,
    found: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    losses: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    metrics = METRICS[key]
    return {
        "id": key,
        "title": SYSTEMS[key].title,
        "purpose": SYSTEMS[key].purpose,
        "prompts": found["prompts"],
        "rows": [
            (metric, [show_figure(metric, found[role], found["prompts"]) for role in ROLES])
            for metric in metrics
        ],
        "charts": [_metric_chart(metric, found) for metric in metrics if metric.charted],
        "answers": _clean(answers),
        "loss": _loss_chart(SYSTEMS[key].title, losses),
    }


def _metric_chart(metric: Metric, found: Mapping[str, Any]) -> dict[str, Any]:
    from markupsafe import Markup

    bars = []
    for role, name in ROLES.items():
        value = found[role].get(metric.key)
        known = metric.key == "accuracy" and is_number(value)
        interval = wilson_interval(value, found["prompts"]) if known else None
        bars.append(Bar(name, value, metric.write(value) if is_number(value) else NOTHING, interval))
    figures = ", ".join(f"{bar.who} {bar.text}" for bar in bars)
    label = f"{metric.name}, {metric.direction}: {figures}"
    return {"metric": metric, "label": label, "svg": Markup(bar_chart(bars))}


def _loss_chart(title: str, losses: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    from markupsafe import Markup

    points = [point for point in losses if is_number(point.get("loss"))]
    if not points:
        return None
    ends = [f"{point['loss']:.2f} at step {point['step']}" for point in (points[0], points[-1])]
    label = f"Training loss of {title}: from {' to '.join(ends)}"
    return {"label": label, "svg": Markup(loss_chart(points))}


def _clean(value: Any) -> Any:
    """Return the value with every text made safe to put in a page, at any depth.

    Control characters become their visible pictures (U+2400 block): a NUL would be dropped by the
    parser. Lone surrogates, which no file can hold, become U+FFFD. Line breaks and tabs stay.
    """
    if isinstance(value, str):
        text = re.sub("\r\n?", "\n", value)
        text = re.sub("[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), text)
        return re.sub("[\x7f-\x9f\ud800-\udfff]", "\ufffd", text)
    if isinstance(value, Mapping):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list | tuple) else value


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
