"""The verdict: whether a student replaces its teacher, with what certainty, in words."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distill_app.comparison.figures import Rows, pairs_unread, refusals, scored, speedup, values
from distill_app.comparison.names import MODELS, STUDENTS, Student
from distill_app.comparison.params import CompareParams
from distill_app.core import statistics
from distill_app.core.statistics import Figure

# With fewer prompts nothing is met or missed: a bootstrap's interval is too narrow for them. Simulated with
# scores and seconds of several spreads, its low end lies above the truth in 24 to 39% of cases with 2
# prompts, 8 to 15% with 5, 5 to 10% with 10, 4 to 8% with 20, 3 to 4% with 50. Nominal are 2.5%.
FEW = 20
THRESHOLDS = {"retention": "min_retention", "speedup": "min_speedup", "multi_step": "min_multi_step"}
WEIGHED = {"retention": "what it keeps", "speedup": "its speed", "multi_step": "its steps"}


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
    "unclear" between, or with few prompts. A student meets all its thresholds or misses one.

    Args:
        models: the figures of the five models.
        rows: the prompts of the student's task, with the five answers.
        costs: of the five models, as they were measured.
        overlap: held-out prompts that training has seen.
    """
    student, before = STUDENTS[name], f"{name}_before"
    judged = scored(student.measure, rows)
    scores = {who: values(student.measure, who, judged) for who in (name, before, "teacher")}
    kept = statistics.ratio(scores[name], scores["teacher"], most=student.most)
    faster = speedup(costs[name], costs["teacher"])
    gain = statistics.difference(scores[name], scores[before], most=student.most)
    checks = [
        _check("retention", kept, params.min_retention, len(judged)),
        _check("speedup", faster, params.min_speedup, len(costs[name]["alone_sec"])),
    ]
    if student.task == "reasoning":
        steps = models[name]["reasoning"]["multi_step"]
        checks.append(_check("multi_step", steps, params.min_multi_step, len(rows)))
    outcomes = {check["outcome"] for check in checks}
    outcome = next((o for o in ("missed", "unclear") if o in outcomes), "met")
    return {
        "task": student.task,
        "measure": student.measure,
        "outcome": outcome,
        "retention": kept,
        "speedup": faster,
        "gain": gain,
        "checks": checks,
        "sentences": [
            _headline(student, outcome, checks),
            *(_SENTENCES[check["name"]](student, check) for check in checks),
            _gained(student, name, models, gain, len(judged)),
            _overlap(student, overlap, len(rows)),
            *_left_out(student, name, rows, len(judged)),
        ],
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


def _check(name: str, found: Figure, wanted: float, count: int) -> dict[str, Any]:
    low, high = found["low"], found["high"]
    outcome = "unclear"
    if count >= FEW and low is not None and low >= wanted:
        outcome = "met"
    elif count >= FEW and high is not None and high < wanted:
        outcome = "missed"
    return {"name": name, "found": found, "wanted": wanted, "outcome": outcome, "prompts": count}


def _headline(student: Student, outcome: str, checks: Sequence[Mapping[str, Any]]) -> str:
    if outcome == "met":
        return f"{student.title} can replace its teacher."
    if outcome == "missed":
        return f"{student.title} does not replace its teacher."
    why = [_unclear(student, check) for check in checks if check["outcome"] == "unclear"]
    return f"Whether {student.title} replaces its teacher cannot be told: {'; '.join(why)}."


def _unclear(student: Student, check: Mapping[str, Any]) -> str:
    if check["found"]["value"] is None and check["prompts"]:
        return f"the teacher has no {student.measure_name}"
    prompts = "timed prompts" if check["name"] == "speedup" else student.prompts_name
    return f"{check['prompts']} {prompts} are too few to weigh {WEIGHED[check['name']]}"


def _kept(student: Student, check: Mapping[str, Any]) -> str:
    if check["found"]["value"] is None:
        return f"The teacher has no {student.measure_name}, so what is kept of them cannot be told."
    return (
        f"It reaches {_shown(check['found'], 100, '%')} of the teacher's {student.measure_name};"
        f" {_against(check, 100, '%')}."
    )


def _speed(student: Student, check: Mapping[str, Any]) -> str:
    times = _shown(check["found"], 1, " times", digits=2)
    return f"One prompt at a time it runs at {times} the teacher's speed; {_against(check, 1, ' times')}."


def _steps(student: Student, check: Mapping[str, Any]) -> str:
    found = _shown(check["found"], 100, "%")
    return f"{found} of its answers take two steps or more; {_against(check, 100, '%')}."


_SENTENCES = {"retention": _kept, "speedup": _speed, "multi_step": _steps}


def _overlap(student: Student, overlap: int, count: int) -> str:
    asked = f"of its {count} held-out {student.prompts_name}"
    if not overlap:
        return f"None {asked} is in its training data."
    are = "is" if overlap == 1 else "are"
    return f"{overlap} {asked} {are} also in its training data: its figures flatter it."


def _left_out(student: Student, name: str, rows: Rows, judged: int) -> Iterator[str]:
    """Yield what the figures of a student do not rest on, where there is any of it."""
    asked = f"of {len(rows)} {student.prompts_name}"
    if judged < len(rows):
        yield f"Not scored, since no answer can be read in the reference: {len(rows) - judged} {asked}."
    for who in ("teacher", f"{name}_before", name):
        if count := refusals(who, rows):
            yield f"Too long for {MODELS[who]}, and counted as failed: {count} {asked}."
    unread = pairs_unread(name, rows)
    if any(unread):
        yield f"Not in its wins, since the judge could not be read: {sum(unread)} of {len(unread)} pairs."


def _gained(student: Student, name: str, models: Mapping[str, Any], gain: Figure, count: int) -> str:
    now, before = (models[who][student.task][student.measure]["value"] for who in (name, f"{name}_before"))
    if now is None:
        return f"That distillation changed it cannot be told: it has no {student.measure_name} to count."
    scale, unit = student.scale, student.unit
    digits = 0 if unit else 1
    numbers = (
        f"{now * scale:.{digits}f}{unit} {student.measure_name}, before it {before * scale:.{digits}f}{unit}"
    )
    changed = f"{numbers}; by {_shown(gain, scale, ' points', digits)}"
    low, high = gain["low"], gain["high"]
    if count >= FEW and low is not None and low > 0:
        return f"Distillation made it better: {changed}."
    if count >= FEW and high is not None and high < 0:
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
