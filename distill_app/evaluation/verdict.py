"""The verdict: may a student take its teacher's place, what was gained, and how sure that is."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_app.evaluation import statistics
from distill_app.evaluation.measures import (
    BY_KEY,
    Evidence,
    Rows,
    Style,
    forced,
    free,
    is_known,
    seconds_an_answer,
    show,
    show_both,
    show_interval,
    write,
)
from distill_app.evaluation.names import ANCHORS, MODELS, STUDENTS, Student
from distill_app.evaluation.params import StudentTargets, System1Targets, System2Targets
from distill_app.evaluation.statistics import Figure
from distill_app.evaluation.wins import length_controlled, unread_pairs

# With fewer prompts nothing is met or missed: intervals of so few are too narrow as often as not.
FEW = 20
POINTS = 100  # of a share


@dataclass(frozen=True)
class Case:
    """What is known of one student: its task's evidence, the figures of all models, and the benchmarks."""

    name: str
    evidence: Evidence
    figures: Mapping[str, Mapping[str, Figure]]  # of models and anchors, in the student's task
    benchmarks: Mapping[str, Any]
    overlap: Mapping[str, int]

    @property
    def student(self) -> Student:
        return STUDENTS[self.name]

    @property
    def before(self) -> str:
        return f"{self.name}_before"

    def figure(self, who: str, key: str) -> Figure:
        """Return a figure of a model or an anchor; one without a value where it was not taken."""
        return self.figures.get(who, {}).get(key) or statistics.plain(None)


Check = dict[str, Any]


def judge_student(case: Case, targets: System1Targets | System2Targets) -> dict[str, Any]:
    """Return the verdict on one student, as comparison.json holds it.

    A target is met where the whole 95% interval reaches it, missed where the whole interval is below, and
    unclear between, or with few prompts. A student meets all its targets or misses one.
    """
    checks = list(_checks(case, targets))
    outcomes = {check["outcome"] for check in checks}
    outcome = next((o for o in ("missed", "unclear") if o in outcomes), "met" if checks else "unclear")
    gain = _gain(case)
    return {
        "task": case.student.task,
        "outcome": outcome,
        "headline": _headline(case.student, outcome, checks),
        "checks": checks,
        "gain": gain,
        "closed": _closed(case),
        "notes": list(_notes(case)),
    }


def below(students: Mapping[str, Any]) -> list[str]:
    """Return a phrase for every figure that is below its target, whatever its interval, or unknown."""
    return [
        f"{STUDENTS[name].title}: {check['name']} is {show(check['style'], check['found'])}, the target is"
        f" {write(check['style'], check['target'])}"
        for name, verdict in students.items()
        for check in verdict["checks"]
        if not is_known(check["found"]["value"]) or check["found"]["value"] < check["target"]
    ]


def require_targets(comparison: Mapping[str, Any]) -> None:
    """Raise ValueError, in one line, if a figure of the comparison is below its target."""
    if faults := below(comparison["students"]):
        raise ValueError(
            f"compare: {'; '.join(faults)}; see the report, or set compare.fail_below to false to go on"
        )


def _checks(case: Case, targets: System1Targets | System2Targets) -> Iterator[Check]:
    if isinstance(targets, System1Targets):
        yield from _fidelity(case, targets.min_fidelity)
        yield from _wins(case, targets.min_win_rate)
    else:
        yield from _right_answers(case, targets.max_points_lost)
        yield _multi_step(case, targets.min_multi_step)
    yield from _benchmarks(case, targets.max_points_lost)
    yield from _speed(case, targets)


def _decided(
    key: str,
    name: str,
    found: Figure,
    target: float,
    style: Style,
    count: int,
    what: str,
    scale: Any = None,
    unclear: str = "",
) -> Check:
    """Return a check with its outcome; `what` says what was found, without the outcome.

    Args:
        count: prompts that the figure rests on.
        unclear: a reason for which the figure decides nothing, whatever it is.
    """
    low, high = found["low"], found["high"]
    outcome, needed = "unclear", None
    if unclear:
        says = unclear
    elif not is_known(found["value"]):
        says = "not measured"
    elif count < FEW:
        needed = max(FEW, statistics.prompts_needed(found, target, count) or 0)
        says = f"{count} prompts are too few to judge, {needed} may do"
    elif low is not None and low >= target:
        outcome = says = "met"
    elif high is not None and high < target:
        outcome = says = "missed"
    else:
        needed = statistics.prompts_needed(found, target, count)
        says = "cannot tell" + (f" from {count} prompts, about {needed} would do" if needed else "")
    return {
        "key": key,
        "name": name,
        "found": found,
        "target": target,
        "style": style,
        "outcome": outcome,
        "needed": needed,
        "sentence": f"{what}; target {_target(style, target)}: {says}.",
        "scale": scale,
    }


def _target(style: Style, target: float) -> str:
    if style == "points":
        return f"at most {-POINTS * target:g} points below"
    return f"{POINTS * target:g} %" if style == "percent" else f"{target:g}×"


# --- fidelity


def _fidelity(case: Case, target: float) -> Iterator[Check]:
    """Yield how far a student is on the way from its floor to its ceiling, by each measure that was taken."""
    rows = case.evidence.rows
    for key in ("agreement", "free_nats"):
        measure = BY_KEY[key]
        assert measure.floor and measure.ceiling
        now, floor, ceiling = (
            forced(rows, who, "agreed") if key == "agreement" else _free(rows, who)
            for who in (case.name, measure.floor, measure.ceiling)
        )
        if not now[0] or not len(now[0]) == len(floor[0]) == len(ceiling[0]):
            continue
        way = statistics.share_closed(*map(_by_prompt, (now, floor, ceiling)))
        at, bottom, top = (case.figure(who, key) for who in (case.name, measure.floor, measure.ceiling))
        numbers = f"{show(measure.style, bottom)} when asked something else and {show(measure.style, top)}"
        if key == "agreement":
            what = (
                f"It agrees with its teacher on {show_both(measure.style, at)} of tokens, between {numbers}"
                " for the teacher asked as it is"
            )
        else:
            what = (
                f"The teacher finds its answers {show_both(measure.style, at)} nats a token unlikely, between"
                f" {numbers} for the teacher's own"
            )
        what += f": {show_both('percent', way)} of the way"
        unclear = ""
        if not is_known(way["value"]):
            unclear = "cannot tell, since floor and ceiling are not clearly apart"
        yield _decided(
            key, measure.name, way, target, "percent", len(now[0]), what, _scale(case, key), unclear
        )


def _free(rows: Rows, who: str) -> tuple[list[float], list[float]]:
    """Return sums that grow with likelihood, as agreement does."""
    nats, tokens = free(rows, who)
    return [-one for one in nats], tokens


def _by_prompt(sums: tuple[Sequence[float], Sequence[float]]) -> list[float]:
    """Return each prompt's part in the rate of sums over tokens; their mean is that rate."""
    tokens = sum(sums[1]) / len(sums[1])
    return [one / tokens for one in sums[0]]


def _scale(case: Case, key: str) -> dict[str, Any]:
    measure = BY_KEY[key]
    points = [
        (measure.floor, "floor"),
        (case.before, "before"),
        (case.name, "student"),
        (measure.ceiling, "ceiling"),
    ]
    return {
        "measure": key,
        "points": [
            {"label": {**MODELS, **ANCHORS}[who], "role": role, "figure": case.figure(who, key)}
            for who, role in points
            if who and is_known(case.figure(who, key)["value"])
        ],
    }


# --- right answers and benchmarks


def _right_answers(case: Case, max_points_lost: float) -> Iterator[Check]:
    """Yield a check for problems of known and of new frames, or one for all where a sort has too few."""
    rows, known = case.evidence.rows, list(case.evidence.known)
    sorts = {
        "accuracy_known": [row for row, is_known_ in zip(rows, known, strict=True) if is_known_],
        "accuracy_new": [row for row, is_known_ in zip(rows, known, strict=True) if not is_known_],
    }
    if min(map(len, sorts.values())) < FEW:
        sorts = {"accuracy": list(rows)}
    for key, those in sorts.items():
        scores = {
            who: [float(row[who]["right"]) for row in those if row[who]["right"] is not None]
            for who in (case.name, "teacher")
        }
        what = {
            "accuracy": "It is right on {} of problems, its teacher on {}",
            "accuracy_known": "On problems of known frames it is right on {}, its teacher on {}",
            "accuracy_new": "On problems of new frames it is right on {}, its teacher on {}",
        }[key].format(*(show_both("percent", case.figure(who, key)) for who in (case.name, "teacher")))
        yield _points(
            case, key, BY_KEY[key].name, scores[case.name], scores["teacher"], max_points_lost, what, 0.0, key
        )


def _points(
    case: Case,
    key: str,
    name: str,
    student: Sequence[float],
    teacher: Sequence[float],
    max_points_lost: float,
    what: str,
    chance: float,
    measure: str | None,
) -> Check:
    """Return the check of a paired difference against the non-inferiority margin.

    Where a student that answers by chance would pass too, since its teacher is hardly better, it decides only
    for a student that is clearly above the teacher.
    """
    margin = max_points_lost / POINTS
    found = statistics.paired_points(student, teacher)
    is_share = set(teacher) <= {0.0, 1.0}
    skill = statistics.share([bool(t) for t in teacher]) if is_share else statistics.mean(teacher)
    unclear = ""
    clearly_above = found["low"] is not None and found["low"] > 0
    if len(teacher) >= FEW and not clearly_above and _at_least(skill) <= chance + margin:
        unclear = "cannot tell, since its teacher is too weak here to be a yardstick"
    told = f"{what}: {show('points', found)} points" if is_known(found["value"]) else what
    if interval := show_interval("points", found):
        told += f" ({interval})"
    scale = _scale(case, measure) if measure else None
    if scale and measure:
        teachers = {"label": MODELS["teacher"], "role": "ceiling", "figure": case.figure("teacher", measure)}
        scale["points"].append(teachers)
    return _decided(key, name, found, -margin, "points", len(student), told, scale, unclear)


def _at_least(skill: Figure) -> float:
    """Return the low end of a figure; where all scores are alike it has none but its value."""
    return next((one for one in (skill["low"], skill["value"]) if one is not None), 0.0)


def _benchmarks(case: Case, max_points_lost: float) -> Iterator[Check]:
    for task, result in case.benchmarks.items():
        student, teacher = (result.get("scores", {}).get(who) for who in (case.name, "teacher"))
        if not student or not teacher or not all(0 <= score <= 1 for score in [*student, *teacher]):
            continue  # it has no scores question by question, or no points to lose: told, and decides nothing
        rises = result.get("higher_is_better", True)
        figures = (result["models"].get(who) or statistics.plain(None) for who in (case.name, "teacher"))
        what = "On {} it has {}, its teacher {}".format(task, *(show_both("percent", one) for one in figures))
        own, others = ([one if rises else 1 - one for one in scores] for scores in (student, teacher))
        chance = (result.get("chance") or 0.0) if rises else 0.0
        yield _points(case, f"benchmark:{task}", task, own, others, max_points_lost, what, chance, None)


def _multi_step(case: Case, target: float) -> Check:
    found = case.figure(case.name, "multi_step")
    what = f"{show_both('percent', found)} of its answers take two steps or more"
    return _decided("multi_step", "In steps", found, target, "percent", len(case.evidence.rows), what)


# --- judge and cost


def _wins(case: Case, target: float) -> Iterator[Check]:
    rows = [row for row in case.evidence.rows if "judged" in row.get(case.name, {})]
    if not rows:
        return
    found = length_controlled(rows, case.name, "teacher")
    what = f"Before the judge it wins {show_both('percent', found)} against its teacher at equal length"
    count = len(rows) - unread_pairs(rows, case.name, "teacher")
    yield _decided("win_rate", "Wins against the teacher", found, target, "percent", count, what)


def _speed(case: Case, targets: StudentTargets) -> Iterator[Check]:
    own = seconds_an_answer(case.evidence, case.name, "teacher")
    teachers = seconds_an_answer(case.evidence, "teacher", case.name)
    if not own or not teachers:
        return
    found = statistics.speed_ratio(own, teachers)
    one, other = (show("seconds", case.figure(who, "seconds")) for who in (case.name, "teacher"))
    lengths = [show("tokens", case.figure(who, "length")) for who in (case.name, "teacher")]
    what = (
        f"An answer takes it {one} ({lengths[0]} tokens), its teacher {other} ({lengths[1]} tokens):"
        f" {show_both('times', found)} as fast"
    )
    count = len(own[0])
    yield _decided("speedup", "Speed-up", found, targets.min_speedup, "times", count, what)


# --- gain


def _gain(case: Case) -> dict[str, Any] | None:
    """Return what distillation changed, by the student's main measure; None where that was not taken."""
    measure = BY_KEY[case.student.gain]
    before, after = (case.figure(who, measure.key) for who in (case.before, case.name))
    if not is_known(before["value"]) or not is_known(after["value"]):
        return None
    change, count = _change(case, case.before)
    low, high = change["low"], change["high"]
    outcome = "same"
    if count >= FEW and low is not None and low > 0:
        outcome = "better"
    elif count >= FEW and high is not None and high < 0:
        outcome = "worse"
    said = {
        "better": "Distillation made it better",
        "worse": "Distillation made it worse",
        "same": "Distillation made no significant change",
    }[outcome]
    name = "agreement" if measure.key == "agreement" else "right answers"
    return {
        "measure": measure.key,
        "before": before,
        "after": after,
        "change": change,
        "outcome": outcome,
        "sentence": f"{said}: {show('percent', after)} {name}, {show('percent', before)} before;"
        f" {show_both('points', change)} points.",
    }


def _change(case: Case, since: str) -> tuple[Figure, int]:
    """Return the paired difference of a student to an earlier state of it, and over how many prompts.

    Agreement is a difference of two rates over the same prompts; each has its own count of tokens.
    """
    rows = case.evidence.rows
    if case.student.gain == "agreement":
        after, before = (_by_prompt(forced(rows, who, "agreed")) for who in (case.name, since))
        return statistics.mean([one - other for one, other in zip(after, before, strict=True)]), len(after)
    pairs = [(row[case.name]["right"], row[since]["right"]) for row in rows]
    pairs = [pair for pair in pairs if None not in pair]
    return statistics.paired_points([float(a) for a, _ in pairs], [float(b) for _, b in pairs]), len(pairs)


def _closed(case: Case) -> dict[str, Any] | None:
    """Return what share of the gap to the teacher distillation closed; None where there is no gap."""
    rows, before = case.evidence.rows, case.before
    if case.student.gain == "agreement":
        sums = [forced(rows, who, "agreed") for who in (case.name, before, "teacher_as_student")]
        if not sums[0][0] or len({len(one[0]) for one in sums}) > 1:
            return None
        found = statistics.share_closed(*map(_by_prompt, sums))
        gap = "the gap in agreement between the student before and the teacher asked as it is"
    else:
        scores = [
            [float(row[who]["right"]) for row in rows if row[who]["right"] is not None]
            for who in (case.name, before, "teacher")
        ]
        found = statistics.share_closed(*scores)
        gap = "the gap in right answers between the student before and its teacher"
    if not is_known(found["value"]):
        return None
    return {"figure": found, "sentence": f"Distillation closed {show_both('percent', found)} of {gap}."}


# --- words


def _headline(student: Student, outcome: str, checks: Sequence[Check]) -> str:
    if outcome == "met":
        return f"{student.title} can replace its teacher."
    if outcome == "missed":
        return f"{student.title} does not replace its teacher."
    if not checks:
        return f"Whether {student.title} can replace its teacher was not measured."
    open_checks = [check for check in checks if check["outcome"] == "unclear"]
    names = ", ".join(check["name"][:1].lower() + check["name"][1:] for check in open_checks)
    needed = max((check["needed"] or 0 for check in open_checks), default=0)
    more = f"; about {needed} prompts would do" if needed else ""
    return f"Whether {student.title} can replace its teacher is not decided ({names}){more}."


def _notes(case: Case) -> Iterator[str]:
    """Yield what a verdict rests on and what it leaves out, where there is any of it."""
    student, rows = case.student, case.evidence.rows
    yield from _refined(case)
    yield from _overlap(case)
    yield from _generalisation(case)
    for key, words in (
        ("cut", "Cut at the token limit"),
        ("refused", "Not answered, since the prompt was too long, and counted as failed"),
    ):
        told = []
        for who in ("teacher", case.before, case.name):
            count = sum(bool(row[who][key]) for row in rows if who in row)
            if count:
                told.append(f"{MODELS[who]} {count}")
        if told:
            yield f"{words}, of {len(rows)} answers each: {', '.join(told)}."
    if student.task == "reasoning":
        unread = sum(row["teacher"]["right"] is None for row in rows if "teacher" in row)
        if unread:
            yield f"Not scored, since no final answer can be read in the reference: {unread} of {len(rows)}."
    judged = [row for row in rows if "judged" in row.get(case.name, {})]
    if judged and (unread := unread_pairs(judged, case.name, "teacher")):
        yield f"Left out of its wins, since the judge could not be read: {unread} of {len(judged)} pairs."


def _refined(case: Case) -> Iterator[str]:
    """Yield what refining a student on its own answers changed, since its training on words."""
    on_words = f"{case.name}_words"
    figure = case.figure(on_words, case.student.gain)
    if is_known(figure["value"]):
        change, _ = _change(case, on_words)
        yield (
            f"Refining it on its own answers changed that by {show_both('points', change)} points, from"
            f" {show('percent', figure)} after its training on words."
        )


def _overlap(case: Case) -> Iterator[str]:
    found, name = case.overlap, case.student.prompts_name
    asked = f"of its {found['prompts']} held-out {name}"
    if found["exact"]:
        yield f"{found['exact']} {asked} are in its training data too: on those it may only repeat."
    else:
        yield f"None {asked} is in its training data."
    if found["ngram"]:
        yield f"{found['ngram']} {asked} share 13 words in a row with its training data."
    if found["masked"]:
        yield f"{found['masked']} {asked} differ from training data in names and numbers alone."


def _generalisation(case: Case) -> Iterator[str]:
    """Yield whether a student does worse where training knows no problem of the same frame."""
    if case.student.task != "reasoning":
        return
    rights = [row[case.name]["right"] for row in case.evidence.rows]
    pairs = [pair for pair in zip(rights, case.evidence.known, strict=True) if pair[0] is not None]
    known, new = [right for right, is_in in pairs if is_in], [right for right, is_in in pairs if not is_in]
    if min(len(known), len(new)) < FEW:
        return
    change = statistics.unpaired_points(new, known)
    if change["high"] is not None and change["high"] < 0:
        yield (
            "On frames that training never saw it is right less often, by"
            f" {show_both('points', change)} points: part of what it learned are frames, not how to reason."
        )
    else:
        yield "It does not do significantly worse on frames that training never saw."
