"""What every table of a comparison shows: which models, which measures, which figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from distill_app.evaluation.measures import UNKNOWN, Group, Measure, Style, is_known, measures_of
from distill_app.evaluation.names import ANCHORS, MODELS, Student


def models_of(name: str, comparison: Mapping[str, Any]) -> dict[str, str]:
    """Return the models that a student is held against, itself last, each with its title."""
    shown = ("teacher", f"{name}_before", f"{name}_words", name)
    return {who: MODELS[who] for who in shown if comparison["models"].get(who)}


def figure_of(comparison: Mapping[str, Any], who: str, group: Group, key: str) -> Mapping[str, Any]:
    """Return a figure of a model or an anchor; one without a value where there is none."""
    found = comparison["models"].get(who) or comparison["anchors"].get(who) or {}
    return found.get(group, {}).get(key) or UNKNOWN


def shown_of(comparison: Mapping[str, Any], group: Group) -> list[Measure]:
    """Return the measures of a group that were taken of any model."""
    return [
        measure
        for measure in measures_of(group)
        if any(is_known(figure_of(comparison, who, group, measure.key)["value"]) for who in MODELS)
    ]


def deciding_of(comparison: Mapping[str, Any], student: Student) -> list[Measure]:
    """Return the measures that decide of a student, and were taken."""
    return [measure for measure in shown_of(comparison, student.task) if measure.decides]


def anchors_of(comparison: Mapping[str, Any], group: Group, measures: Sequence[Measure]) -> dict[str, str]:
    """Return the floors and ceilings that bound these measures, where they were taken."""
    named = {who for measure in measures for who in (measure.floor, measure.ceiling)}
    return {
        who: title
        for who, title in ANCHORS.items()
        if who in named
        and any(is_known(figure_of(comparison, who, group, measure.key)["value"]) for measure in measures)
    }


def benchmark_style(result: Mapping[str, Any]) -> Style:
    """Return how a benchmark's figures are written: a share in percent, a perplexity or a BLEU as it is."""
    values = [figure["value"] for figure in result["models"].values() if is_known(figure["value"])]
    is_share = result.get("higher_is_better", True) and all(0 <= value <= 1 for value in values)
    return "percent" if is_share else "number"
