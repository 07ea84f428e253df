"""From answers and costs to figures: what each model does, what it keeps of the teacher's skill."""

from collections.abc import Mapping, Sequence
from typing import Any

from distill_app.comparison.names import MODELS
from distill_app.core import statistics
from distill_app.core.statistics import Figure

Rows = Sequence[Mapping[str, Any]]  # a prompt with the five answers
WIN = {"won": 1.0, "tied": 0.5, "lost": 0.0}
SCORES = {"chrf": "chrf", "accuracy": "right"}  # the key of an answer that a measure reads


def model_figures(name: str, answers: Mapping[str, Rows], cost: Mapping[str, Any]) -> dict[str, Any]:
    """Return all figures of one model, as comparison.json holds them."""
    return {
        "name": cost["model"],
        "instructions": _instructions(name, answers["instructions"]),
        "reasoning": _reasoning(name, answers["reasoning"]),
        "cost": _cost(cost),
    }


def scored(measure: str, rows: Rows) -> Rows:
    """Return the rows that a measure can judge: no answer is right or wrong where the reference has none."""
    return [row for row in rows if row["teacher"][SCORES[measure]] is not None]


def values(measure: str, name: str, rows: Rows) -> list[float]:
    """Return what a measure ("chrf" or "accuracy") gives each answer of a model, of rows that are scored."""
    return [float(row[name][SCORES[measure]]) for row in rows]


def refusals(name: str, rows: Rows) -> int:
    """Count the prompts that were too long for a model."""
    return sum(row[name]["refused"] for row in rows)


def pairs_unread(name: str, rows: Rows) -> list[bool]:
    """Return for each pair that a judge saw whether one of its two replies could not be read."""
    ways = [row[name]["against_teacher"] for row in rows if "against_teacher" in row[name]]
    return ["unread" in pair for pair in ways]


def speedup(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> Figure:
    """Return how many times as fast as the teacher the student answers the same prompts, one at a time."""
    return statistics.ratio(teacher["alone_sec"], student["alone_sec"])


def _instructions(name: str, rows: Rows) -> dict[str, Figure]:
    # The loss is compared on the references that all five could read.
    found = [row[name] for row in rows if all("reference_nats" in row[who] for who in MODELS)]
    nats, tokens = ([answer[key] for answer in found] for key in ("reference_nats", "reference_tokens"))
    figures = {
        "loss": statistics.ratio(nats, tokens),
        "chrf": statistics.mean(values("chrf", name, rows)),
        **_lengths(name, rows),
    }
    if unread := pairs_unread(name, rows):
        judged = [row[name]["against_teacher"] for row in rows]
        wins = [sum(WIN[way] for way in ways) / 2 for ways in judged if "unread" not in ways]
        figures["win_rate"] = statistics.mean(wins)
        if any(any(pairs_unread(who, rows)) for who in MODELS):
            figures["unread"] = statistics.share(unread)
    return figures


def _reasoning(name: str, rows: Rows) -> dict[str, Figure]:
    right = [bool(value) for value in values("accuracy", name, scored("accuracy", rows))]
    return {
        "accuracy": statistics.share(right),
        "multi_step": statistics.share([row[name]["steps"] > 1 for row in rows]),
        **_lengths(name, rows),
    }


def _lengths(name: str, rows: Rows) -> dict[str, Figure]:
    figures = {
        "length": statistics.mean([row[name]["tokens"] for row in rows]),
        "cut": statistics.share([row[name]["cut"] for row in rows]),
    }
    if any(refusals(who, rows) for who in MODELS):
        figures["refused"] = statistics.share([row[name]["refused"] for row in rows])
    return figures


def _cost(cost: Mapping[str, Any]) -> dict[str, Figure]:
    alone, batch = cost["alone_sec"], cost["batch_sec"]
    return {
        "tokens_per_sec": statistics.ratio([cost["tokens"]] * len(alone), alone),
        "latency_p50_sec": statistics.percentile(alone, 50),
        "latency_p95_sec": statistics.percentile(alone, 95),
        "tokens_per_sec_batch": statistics.plain(cost["tokens"] * len(batch) / max(batch)),
        "latency_p50_sec_batch": statistics.percentile(batch, 50),
        "latency_p95_sec_batch": statistics.percentile(batch, 95),
        "peak_memory_bytes": statistics.plain(cost["peak_memory_bytes"]),
        "parameters": statistics.plain(cost["parameters"]),
        "bytes": statistics.plain(cost["bytes"]),
    }
