"""The verdict: whether a student replaces its teacher, with what certainty, in words."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from distill_app.comparison.figures import Rows, speedup, values
from distill_app.comparison.params import CompareParams
from distill_app.core import statistics
from distill_app.core.statistics import Figure


class Student(NamedTuple):
    """What a student is for, and by which measure it is held against the teacher."""

    title: str
    task: str
    measure: str
    measure_name: str
    prompts_name: str
    scale: float  # of the measure as it is written: chrF as it is, shares in percent
    unit: str


STUDENTS = {
    "system1": Student("System 1", "instructions", "chrf", "chrF", "prompts", 1, ""),
    "system2": Student("System 2", "reasoning", "accuracy", "right answers", "problems", 100, "%"),
}
THRESHOLDS = {"retention": "min_retention", "speedup": "min_speedup", "multi_step": "min_multi_step"}


def judge_student(
    name: str,
    models: Mapping[str, Any],
    rows: Rows,
    costs: Mapping[str, Any],
    overlap: int,
    params: CompareParams,
) -> dict[str, Any]:
    """Return the verdict on one student ("system1" or "system2"), as comparison.json holds it.

    A threshold is met where the whole interval reaches it, missed where the whole interval is below, and
    "unclear" between: too few prompts to tell. A student meets all its thresholds or misses one.

    Args:
        models: the figures of the five models.
        rows: the prompts of the student's task, with the five answers.
        costs: of the five models, as they were measured.
        overlap: held-out prompts that training has seen.
    """
    student = STUDENTS[name]
    scores = {who: values(student.measure, who, rows) for who in (name, f"{name}_before", "teacher")}
    found = {
        "retention": statistics.ratio(scores[name], scores["teacher"]),
        "speedup": speedup(costs[name], costs["teacher"]),
    }
    if student.task == "reasoning":
        found["multi_step"] = models[name]["reasoning"]["multi_step"]
    checks = [_check(check, found[check], getattr(params, THRESHOLDS[check])) for check in found]
    outcomes = {check["outcome"] for check in checks}
    outcome = next((o for o in ("missed", "unclear") if o in outcomes), "met")
    gain = statistics.difference(scores[name], scores[f"{name}_before"])
    sentences = [_headline(student, outcome, len(rows)), _kept(student, found["retention"], checks[0])]
    sentences += [_SENTENCES[check["name"]](check) for check in checks[1:]]
    sentences.append(_gained(student, name, models, gain))
    if overlap:
        sentences.append(
            f"{overlap} of its {len(rows)} held-out {student.prompts_name} are also in its training data:"
            " its figures flatter it."
        )
    return {
        "task": student.task,
        "measure": student.measure,
        "outcome": outcome,
        "retention": found["retention"],
        "speedup": found["speedup"],
        "gain": gain,
        "checks": checks,
        "sentences": sentences,
    }


def below(verdicts: Mapping[str, Any]) -> list[str]:
    """Return a phrase for every figure that is below its threshold, whatever its interval, or unknown."""
    return [
        f"{STUDENTS[name].title}'s {check['name']} is {_number(check['found']['value'])},"
        f" compare.{THRESHOLDS[check['name']]} is {check['wanted']:g}"
        for name, verdict in verdicts.items()
        for check in verdict["checks"]
        if check["found"]["value"] is None or check["found"]["value"] < check["wanted"]
    ]


def _check(name: str, found: Figure, wanted: float) -> dict[str, Any]:
    low, high = found["low"], found["high"]
    outcome = "unclear"
    if low is not None and low >= wanted:
        outcome = "met"
    elif high is not None and high < wanted:
        outcome = "missed"
    return {"name": name, "found": found, "wanted": wanted, "outcome": outcome}


def _headline(student: Student, outcome: str, count: int) -> str:
    return {
        "met": f"{student.title} can replace its teacher.",
        "missed": f"{student.title} does not replace its teacher.",
        "unclear": f"Whether {student.title} replaces its teacher cannot be told:"
        f" {count} {student.prompts_name} are too few.",
    }[outcome]


def _kept(student: Student, retention: Figure, check: Mapping[str, Any]) -> str:
    if retention["value"] is None:
        return f"The teacher has no {student.measure_name}, so what is kept of them cannot be told."
    return (
        f"It reaches {_shown(retention, 100, '%')} of the teacher's {student.measure_name};"
        f" {_against(check, 100, '%')}."
    )


def _speed(check: Mapping[str, Any]) -> str:
    times = _shown(check["found"], 1, " times", digits=2)
    return f"One prompt at a time it runs at {times} the teacher's speed; {_against(check, 1, ' times')}."


def _steps(check: Mapping[str, Any]) -> str:
    found = _shown(check["found"], 100, "%")
    return f"{found} of its answers take two steps or more; {_against(check, 100, '%')}."


_SENTENCES = {"speedup": _speed, "multi_step": _steps}


def _gained(student: Student, name: str, models: Mapping[str, Any], gain: Figure) -> str:
    now, before = (models[who][student.task][student.measure]["value"] for who in (name, f"{name}_before"))
    scale, unit = student.scale, student.unit
    digits = 0 if unit else 1
    numbers = (
        f"{now * scale:.{digits}f}{unit} {student.measure_name}, before it {before * scale:.{digits}f}{unit}"
    )
    changed = f"{numbers}; by {_shown(gain, scale, ' points', digits)}"
    low, high = gain["low"], gain["high"]
    if low is not None and low > 0:
        return f"Distillation made it better: {changed}."
    if high is not None and high < 0:
        return f"Distillation made it worse: {changed}."
    return f"That distillation changed it cannot be told: {changed}."


def _against(check: Mapping[str, Any], scale: float, unit: str) -> str:
    outcome = {"met": "met", "missed": "missed", "unclear": "too few prompts to tell"}[check["outcome"]]
    return f"wanted are {check['wanted'] * scale:g}{unit}: {outcome}"


def _shown(figure: Figure, scale: float, unit: str, digits: int = 0) -> str:
    """Return a figure with its interval in words; a side without a bound is told."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    if value is None:
        return "an unknown share" if unit == "%" else f"an unknown number of{unit}"

    def write(number: float) -> str:
        return f"{number * scale:.{digits}f}"

    if low is None:
        return f"{write(value)}{unit}"
    interval = f"{write(low)} to {write(high)}" if high is not None else f"{write(low)} or more"
    return f"{write(value)}{unit} (95% interval {interval})"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"
