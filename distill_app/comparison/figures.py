"""From answers and costs to figures: what each model does, what it keeps of the teacher's skill."""

from collections.abc import Mapping, Sequence
from typing import Any

from distill_app.core import statistics
from distill_app.core.statistics import Figure

MODELS = ("teacher", "system1_before", "system1", "system2_before", "system2")
Rows = Sequence[Mapping[str, Any]]  # a prompt with the five answers
WIN = {"won": 1.0, "tied": 0.5, "unread": 0.5, "lost": 0.0}


def model_figures(name: str, answers: Mapping[str, Rows], cost: Mapping[str, Any]) -> dict[str, Any]:
    """Return all figures of one model, as comparison.json holds them."""
    return {
        "name": cost["model"],
        "instructions": _instructions([row[name] for row in answers["instructions"]]),
        "reasoning": _reasoning([row[name] for row in answers["reasoning"]]),
        "cost": _cost(cost),
    }


def values(measure: str, name: str, rows: Rows) -> list[float]:
    """Return what a measure ("chrf" or "accuracy") gives for each answer of a model."""
    key = {"chrf": "chrf", "accuracy": "right"}[measure]
    return [float(row[name][key]) for row in rows]


def speedup(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> Figure:
    """Return how many times as fast as the teacher the student answers the same prompts, one at a time."""
    return statistics.ratio(teacher["alone_sec"], student["alone_sec"])


def _instructions(found: Rows) -> dict[str, Figure]:
    figures = {
        "loss": statistics.ratio(
            [answer["reference_nats"] for answer in found], [answer["reference_tokens"] for answer in found]
        ),
        "chrf": statistics.mean([answer["chrf"] for answer in found]),
        **_lengths(found),
    }
    if all("against_teacher" in answer for answer in found):
        wins = [sum(WIN[way] for way in answer["against_teacher"]) / 2 for answer in found]
        figures["win_rate"] = statistics.mean(wins)
    return figures


def _reasoning(found: Rows) -> dict[str, Figure]:
    return {
        "accuracy": statistics.share([answer["right"] for answer in found]),
        "multi_step": statistics.share([answer["steps"] > 1 for answer in found]),
        **_lengths(found),
    }


def _lengths(found: Rows) -> dict[str, Figure]:
    return {
        "length": statistics.mean([answer["tokens"] for answer in found]),
        "cut": statistics.share([answer["cut"] for answer in found]),
    }


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
