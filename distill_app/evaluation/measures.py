"""Every measure of the comparison, described once: its name, unit, direction, where it is shown, how it is
computed. Pages, tables and verdict take all of it from here; a new measure is a row of `MEASURES`.

A measure is computed from what `measure` stored: texts, likelihoods and seconds. It asks no model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from distill_app.evaluation import statistics
from distill_app.evaluation.statistics import Figure
from distill_app.evaluation.wins import length_controlled

Rows = Sequence[Mapping[str, Any]]  # a prompt with what each model made of it
Group = Literal["instructions", "reasoning", "size"]
Style = Literal["percent", "points", "number", "nats", "seconds", "tokens", "times", "bytes", "count"]
TASKS: tuple[Group, ...] = ("instructions", "reasoning")
NOTHING = "–"
UNKNOWN: Figure = {"value": None, "low": None, "high": None}


@dataclass(frozen=True)
class Evidence:
    """What a measure reads: the scored rows of a task, and what each model costs."""

    group: Group
    rows: Rows
    costs: Mapping[str, Any]
    known: Sequence[bool] = ()  # of each problem, whether training knows its frame
    losses: Mapping[str, float] = field(default_factory=dict)  # of students, on examples held out of training


@dataclass(frozen=True)
class Measure:
    """One measure of a model.

    `floor` and `ceiling` name what a student's figure is held between; the floor is what a model gets without
    reading the prompt, or the student had before, the ceiling what the teacher itself gets.
    """

    key: str
    name: str
    short: str  # the head of a narrow column
    meaning: str
    groups: tuple[Group, ...]
    better: Literal["higher", "lower", ""]
    style: Style
    compute: Callable[[Evidence, str], Figure]
    decides: bool = False  # its figures decide, and stand on the first screen
    floor: str | None = None
    ceiling: str | None = None

    @property
    def arrow(self) -> str:
        """Return the direction as a sign."""
        return {"higher": "↑", "lower": "↓"}.get(self.better, "")

    @property
    def direction(self) -> str:
        """Return the direction in words."""
        return f"{self.better} is better" if self.better else ""


def _agreement(evidence: Evidence, who: str) -> Figure:
    return statistics.rate(*forced(evidence.rows, who, "agreed"), most=1)


def _kl(evidence: Evidence, who: str) -> Figure:
    return statistics.rate(*forced(evidence.rows, who, "kl"))


def _loss(evidence: Evidence, who: str) -> Figure:
    """Return the loss on what the student learned from: the teacher's answers, or the data's own traces."""
    if evidence.group == "reasoning":
        return statistics.plain(evidence.losses.get(who))
    return statistics.rate(*forced(evidence.rows, who, "nats"))


def forced(rows: Rows, who: str, key: str) -> tuple[list[float], list[float]]:
    """Return of each prompt a sum over the teacher's answer as `who` reads it, and the answer's tokens."""
    found = [row["forced"][who] for row in rows if row.get("forced") and who in row["forced"]]
    return [one[key] for one in found], [one["tokens"] for one in found]


def free(rows: Rows, who: str) -> tuple[list[float], list[float]]:
    """Return of each prompt the teacher's nats for the answer of `who`, and the answer's tokens."""
    found = [row["free"][who] for row in rows if row.get("free") and row["free"].get(who)]
    return [one["nats"] for one in found], [one["tokens"] for one in found]


def _free(evidence: Evidence, who: str) -> Figure:
    return statistics.rate(*free(evidence.rows, who))


def _mean(key: str) -> Callable[[Evidence, str], Figure]:
    def compute(evidence: Evidence, who: str) -> Figure:
        return statistics.mean([row[who][key] for row in evidence.rows if key in row.get(who, {})])

    return compute


def _share(key: str) -> Callable[[Evidence, str], Figure]:
    def compute(evidence: Evidence, who: str) -> Figure:
        found = [row[who].get(key) for row in evidence.rows if who in row]
        return statistics.share([bool(value) for value in found if value is not None])

    return compute


def _right_where(known: bool) -> Callable[[Evidence, str], Figure]:
    def compute(evidence: Evidence, who: str) -> Figure:
        pairs = zip(evidence.rows, evidence.known, strict=True)
        found = [row[who]["right"] for row, is_known in pairs if is_known is known and who in row]
        return statistics.share([value for value in found if value is not None])

    return compute


def _multi_step(evidence: Evidence, who: str) -> Figure:
    return statistics.share([row[who]["steps"] > 1 for row in evidence.rows if who in row])


def seconds_an_answer(evidence: Evidence, who: str, beside: str | None = None) -> list[list[float]]:
    """Return the seconds of each answer, one at a time, `(rounds, prompts)`; [] where none was timed.

    Reading and the pace of writing come from the timed prompts of a round, the length is each answer's own.
    Prompts that were refused take no time and are left out, those that `beside` was refused too.
    """
    timed = evidence.costs.get(who, {}).get("timed", {}).get(evidence.group)
    lengths = _lengths(evidence.rows, who, beside or who)
    if not timed or not lengths:
        return []
    rounds = []
    for first, whole in zip(timed["first_sec"], timed["alone_sec"], strict=True):
        written = sum(timed["alone_tokens"]) - len(first)
        pace = max(0.0, sum(whole) - sum(first)) / written if written else 0.0
        read = sum(first) / len(first)
        rounds.append([read + pace * max(0, length - 1) for length in lengths])
    return rounds


def _lengths(rows: Rows, who: str, beside: str) -> list[int]:
    own = [row for row in rows if who in row and beside in row]
    return [row[who]["tokens"] for row in own if not row[who]["refused"] and not row[beside]["refused"]]


def _seconds(evidence: Evidence, who: str) -> Figure:
    rounds = seconds_an_answer(evidence, who)
    if not rounds:
        return UNKNOWN
    return statistics.mean([sum(of) / len(of) for of in zip(*rounds, strict=True)])


def _seconds_under_load(evidence: Evidence, who: str) -> Figure:
    """Return the machine's seconds an answer, where it answers many at once."""
    timed = evidence.costs.get(who, {}).get("timed", {}).get(evidence.group)
    lengths = _lengths(evidence.rows, who, who)
    if not timed or not timed["load_tokens"] or not lengths:
        return UNKNOWN
    mean = sum(lengths) / len(lengths)
    rounds = [seconds / timed["load_tokens"] * mean for seconds in timed["load_sec"]]
    return statistics.figure(sum(rounds) / len(rounds), min(rounds), max(rounds))


def _memory(evidence: Evidence, who: str) -> Figure:
    cost = evidence.costs.get(who, {})
    working = [of["working_bytes"] for of in cost.get("timed", {}).values()]
    if not working or None in working or "loaded_bytes" not in cost:
        return UNKNOWN
    return statistics.plain(cost["loaded_bytes"] + max(working))


def _wins(opponent: str) -> Callable[[Evidence, str], Figure]:
    def compute(evidence: Evidence, who: str) -> Figure:
        rows = [row for row in evidence.rows if "judged" in row.get(who, {})]
        return length_controlled(rows, who, opponent)

    return compute


def _size(key: str) -> Callable[[Evidence, str], Figure]:
    return lambda evidence, who: statistics.plain(evidence.costs.get(who, {}).get(key))


MEASURES = (
    Measure(
        "agreement",
        "Agreement with the teacher",
        "agrees",
        "of the tokens of the teacher's answers, how often both find the same token likeliest",
        ("instructions",),
        "higher",
        "percent",
        _agreement,
        decides=True,
        floor="system1_other_prompt",
        ceiling="teacher_as_student",
    ),
    Measure(
        "free_nats",
        "How unlikely the teacher finds its answers",
        "unlikely",
        "nats a token that the teacher gives to what the model wrote",
        ("instructions",),
        "lower",
        "nats",
        _free,
        decides=True,
        floor="system1_other_prompt",
        ceiling="teacher",
    ),
    Measure(
        "wins",
        "Wins against the teacher",
        "wins",
        "before the judge at equal length, ties half",
        ("instructions",),
        "higher",
        "percent",
        _wins("teacher"),
        decides=True,
    ),
    Measure(
        "wins_before",
        "Wins against itself before",
        "wins, before",
        "before the judge at equal length, against the student before distillation",
        ("instructions",),
        "higher",
        "percent",
        _wins("before"),
    ),
    Measure(
        "accuracy",
        "Right answers",
        "right",
        "of the held-out problems",
        ("reasoning",),
        "higher",
        "percent",
        _share("right"),
        decides=True,
    ),
    Measure(
        "accuracy_known",
        "Right answers on known frames",
        "known",
        "problems whose frame is in the training data with other names and numbers",
        ("reasoning",),
        "higher",
        "percent",
        _right_where(True),
        decides=True,
    ),
    Measure(
        "accuracy_new",
        "Right answers on new frames",
        "new",
        "problems of a frame that training never saw",
        ("reasoning",),
        "higher",
        "percent",
        _right_where(False),
        decides=True,
    ),
    Measure(
        "multi_step",
        "In steps",
        "in steps",
        "answers in two steps or more",
        ("reasoning",),
        "higher",
        "percent",
        _multi_step,
        decides=True,
    ),
    Measure(
        "seconds",
        "Seconds an answer",
        "s/answer",
        "one at a time, at the model's own length",
        TASKS,
        "lower",
        "seconds",
        _seconds,
        decides=True,
    ),
    Measure(
        "seconds_load",
        "Seconds an answer under load",
        "s/answer at load",
        "of the machine, several answers at once; the range is that of the rounds",
        TASKS,
        "lower",
        "seconds",
        _seconds_under_load,
    ),
    Measure(
        "length",
        "Tokens an answer",
        "tokens",
        "until it ends or is cut",
        TASKS,
        "",
        "tokens",
        _mean("tokens"),
    ),
    Measure(
        "cut",
        "Cut",
        "cut",
        "answers that reached the token limit",
        TASKS,
        "lower",
        "percent",
        _share("cut"),
    ),
    Measure(
        "refused",
        "Refused",
        "refused",
        "prompts too long for the model, counted as failed",
        TASKS,
        "lower",
        "percent",
        _share("refused"),
    ),
    Measure(
        "kl",
        "KL divergence",
        "KL",
        "nats a token by which its probabilities differ from the teacher's, on the teacher's answers",
        ("instructions",),
        "lower",
        "nats",
        _kl,
        floor="system1_other_prompt",
        ceiling="teacher_as_student",
    ),
    Measure(
        "chrf",
        "chrF",
        "chrF",
        "overlap of its words with the teacher's answers, 0 to 100",
        ("instructions",),
        "higher",
        "number",
        _mean("chrf"),
        ceiling="teacher_again",
    ),
    Measure(
        "loss",
        "Loss",
        "loss",
        "nats a token of held-out answers of the kind that the student learned from",
        TASKS,
        "lower",
        "nats",
        _loss,
        floor="system1_other_prompt",
        ceiling="teacher_as_student",
    ),
    Measure(
        "memory",
        "Memory",
        "memory",
        "weights, and what the timed answers under load took beside them",
        ("size",),
        "lower",
        "bytes",
        _memory,
    ),
    Measure(
        "parameters",
        "Parameters",
        "params",
        "weights in the model",
        ("size",),
        "lower",
        "count",
        _size("parameters"),
    ),
    Measure("bytes", "Size", "size", "of the weights on disk", ("size",), "lower", "bytes", _size("bytes")),
)
BY_KEY = {measure.key: measure for measure in MEASURES}


def measures_of(group: Group) -> list[Measure]:
    """Return the measures of a group, in the order in which they are shown."""
    return [measure for measure in MEASURES if group in measure.groups]


def figures(evidence: Evidence, who: str) -> dict[str, Figure]:
    """Return the figures of one model in one group; a measure that was not taken of it is left out."""
    found = {measure.key: measure.compute(evidence, who) for measure in measures_of(evidence.group)}
    return {key: figure for key, figure in found.items() if figure["value"] is not None}


_UNITS = {
    "bytes": ((1e9, " GB"), (1e6, " MB"), (1e3, " kB"), (1, " B")),
    "count": ((1e9, "B"), (1e6, "M"), (1e3, "K"), (1, "")),
}


def write(style: Style, number: float) -> str:
    """Return a number as people read it: a share as percent, bytes and counts with their unit."""
    if style == "percent":
        return f"{100 * number:.0f}%"
    if style == "points":
        return f"{100 * number:+.0f}"
    if style in _UNITS:
        size, unit = next((pair for pair in _UNITS[style] if abs(number) >= pair[0]), _UNITS[style][-1])
        return f"{number / size:.{1 if number / size < 1000 and size > 1 else 0}f}{unit}"
    digits = {"number": 1, "tokens": 0}.get(style, 2)
    return f"{number:.{digits}f}{ {'seconds': ' s', 'times': '×'}.get(style, '') }"


def show(style: Style, figure: Mapping[str, Any]) -> str:
    """Return a figure's value with its unit, "–" where it is not known."""
    return write(style, figure["value"]) if is_known(figure["value"]) else NOTHING


def show_interval(style: Style, figure: Mapping[str, Any]) -> str:
    """Return the 95 % interval, "1–13%", or "9% or more" without a bound above; empty where none is known."""
    low, high = figure["low"], figure["high"]
    if not is_known(low):
        return ""
    if not is_known(high):
        return f"{write(style, low)} or more"
    first, last = write(style, low), write(style, high)
    unit = last.lstrip("+-0123456789.")
    # "-5–3" reads badly: where a bound is below zero it takes a word.
    between = " to " if low < 0 or style == "points" else "–"
    return f"{first.removesuffix(unit) if unit else first}{between}{last}"


def show_both(style: Style, figure: Mapping[str, Any]) -> str:
    """Return a figure's value and, in brackets where it is known, its interval."""
    interval = show_interval(style, figure)
    return show(style, figure) + (f" ({interval})" if interval else "")


def is_known(value: object) -> bool:
    """Tell whether a value is a number that can be shown: not None, not NaN, not infinite."""
    return isinstance(value, int | float) and math.isfinite(value)
