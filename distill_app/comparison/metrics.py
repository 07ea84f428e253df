"""What is shown of a comparison: the measures, their names and units, and how a figure is written."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from distill_app.comparison.names import MODELS

NOTHING = "–"
UNKNOWN: Mapping[str, Any] = {"value": None, "low": None, "high": None}


class Metric(NamedTuple):
    """One measure: its key, names, what it counts, which way is better, and how its figures are written."""

    key: str
    name: str
    short: str
    meaning: str
    arrow: str  # ↑ higher is better, ↓ lower is better, empty where neither is
    write: Callable[[float], str]
    charted: bool = False

    @property
    def direction(self) -> str:
        """Return the arrow in words."""
        return {"↑": "higher is better", "↓": "lower is better"}.get(self.arrow, "")


class Group(NamedTuple):
    """Measures of one kind, as comparison.json groups them."""

    key: str
    title: str
    metrics: tuple[Metric, ...]


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _scaled(units: tuple[tuple[float, str], ...]) -> Callable[[float], str]:
    def write(number: float) -> str:
        size, unit = next((pair for pair in units if abs(number) >= pair[0]), units[-1])
        return f"{number / size:.{1 if number / size < 1000 and size > 1 else 0}f}{unit}"

    return write


_bytes = _scaled(((1e9, " GB"), (1e6, " MB"), (1e3, " kB"), (1, " B")))
_count = _scaled(((1e9, "B"), (1e6, "M"), (1e3, "K"), (1, "")))
_seconds = "{:.2f} s".format
_rate = "{:.0f}".format

_IN_STEPS = Metric("multi_step", "In steps", "in steps", "answers in two steps or more", "↑", _percent, True)
_LENGTHS = (
    Metric("length", "Length", "tokens", "tokens an answer", "", "{:.0f}".format),
    Metric("cut", "Cut", "cut", "answers that reached the token limit", "↓", _percent),
    Metric(
        "refused", "Refused", "refused", "prompts too long for the model, counted as failed", "↓", _percent
    ),
)
INSTRUCTIONS = Group(
    "instructions",
    "Following instructions",
    (
        Metric("loss", "Loss", "loss", "nats a token of the teacher's answers", "↓", "{:.2f}".format, True),
        Metric(
            "chrf", "chrF", "chrF", "overlap with the teacher's answers, 0 to 100", "↑", "{:.1f}".format, True
        ),
        Metric(
            "win_rate", "Wins", "wins", "against the teacher before a judge, ties half", "↑", _percent, True
        ),
        Metric(
            "unread", "Judge unread", "unread", "pairs whose judge could not be read, left out", "↓", _percent
        ),
        *_LENGTHS,
    ),
)
REASONING = Group(
    "reasoning",
    "Reasoning",
    (
        Metric("accuracy", "Right answers", "right", "of the held-out problems", "↑", _percent, True),
        _IN_STEPS,
        *_LENGTHS,
    ),
)
COST = Group(
    "cost",
    "Cost",
    (
        Metric(
            "tokens_per_sec",
            "Speed, one by one",
            "tokens/s",
            "tokens a second, one prompt at a time",
            "↑",
            _rate,
            True,
        ),
        Metric(
            "latency_p50_sec",
            "Latency, one by one, median",
            "p50",
            "one prompt at a time, equal lengths",
            "↓",
            _seconds,
        ),
        Metric(
            "latency_p95_sec",
            "Latency, one by one, 95th percentile",
            "p95",
            "of the same prompts",
            "↓",
            _seconds,
        ),
        Metric(
            "tokens_per_sec_batch",
            "Speed, all at once",
            "batch",
            "tokens a second, {batch} prompts at once",
            "↑",
            _rate,
            True,
        ),
        Metric(
            "latency_p50_sec_batch",
            "Latency, all at once, median",
            "p50",
            "{batch} prompts at once",
            "↓",
            _seconds,
        ),
        Metric(
            "latency_p95_sec_batch",
            "Latency, all at once, 95th percentile",
            "p95",
            "of the same prompts",
            "↓",
            _seconds,
        ),
        Metric(
            "peak_memory_bytes",
            "Peak memory",
            "memory",
            "weights, and what answering all at once adds",
            "↓",
            _bytes,
            True,
        ),
        Metric("parameters", "Parameters", "params", "weights in the model", "↓", _count),
        Metric("bytes", "Size", "size", "of the weights on disk", "↓", _bytes),
    ),
)
GROUPS = (INSTRUCTIONS, REASONING, COST)
# The measures that decide, for a table of the five models in one look; the page has all.
DECIDING = {
    "loss": INSTRUCTIONS,
    "chrf": INSTRUCTIONS,
    "win_rate": INSTRUCTIONS,
    "accuracy": REASONING,
    "multi_step": REASONING,
    "tokens_per_sec": COST,
    "parameters": COST,
}
# What a student is held against, as its verdict names it.
CHECKS = {
    "retention": Metric("retention", "Skill kept", "kept", "share of the teacher's", "↑", _percent),
    "speedup": Metric("speedup", "Speed-up", "speed-up", "times the teacher's speed", "↑", "{:.2f}×".format),
    "multi_step": _IN_STEPS,
}
# A benchmark's scale is not ours to know.
BENCHMARK = Metric("benchmark", "", "", "", "↑", "{:.3g}".format)


def figure_of(comparison: Mapping[str, Any], model: str, group: Group, metric: Metric) -> Mapping[str, Any]:
    """Return a figure of a model; one without a value where there is none."""
    return comparison["models"][model].get(group.key, {}).get(metric.key) or UNKNOWN


def deciding_metrics(comparison: Mapping[str, Any]) -> list[tuple[Group, Metric]]:
    """Return the deciding measures that were taken, each with its group."""
    return [
        (group, metric)
        for key, group in DECIDING.items()
        for metric in shown_metrics(comparison, group)
        if metric.key == key
    ]


def shown_metrics(comparison: Mapping[str, Any], group: Group) -> list[Metric]:
    """Return the measures of a group that were taken of any model."""
    return [
        metric
        for metric in group.metrics
        if any(is_known(figure_of(comparison, model, group, metric)["value"]) for model in MODELS)
    ]


def show(metric: Metric, figure: Mapping[str, Any]) -> str:
    """Return a figure's value with its unit, "–" where it is not known."""
    return metric.write(figure["value"]) if is_known(figure["value"]) else NOTHING


def show_interval(metric: Metric, figure: Mapping[str, Any]) -> str:
    """Return the 95 % interval, "1–13%", or "9% or more" without a bound above; empty where none is known."""
    if not is_known(figure["low"]):
        return ""
    low = metric.write(figure["low"])
    if not is_known(figure["high"]):
        return f"{low} or more"
    high = metric.write(figure["high"])
    unit = re.sub(r"^-?[\d.]+(e[+-]\d+)?", "", high)
    # "-5–3" reads badly; the few measures that can be below zero take a word.
    return f"{low.removesuffix(unit)}{' to ' if figure['low'] < 0 else '–'}{high}"


def show_both(metric: Metric, figure: Mapping[str, Any]) -> str:
    """Return a figure's value and, in brackets where it is known, its interval."""
    interval = show_interval(metric, figure)
    return show(metric, figure) + (f" ({interval})" if interval else "")


def is_known(value: object) -> bool:
    """Tell whether a value is a number that can be shown: not None, not NaN, not infinite."""
    return isinstance(value, int | float) and math.isfinite(value)
