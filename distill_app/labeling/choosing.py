"""Which of several answers to a prompt is kept, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from distill_app.core.final_answers import are_equal, final_answer, is_right
from distill_app.generation.answers import Answer

Chooser = Literal["majority", "reference", "judge", "likelihood"]
Why = Literal[
    "right",
    "majority",
    "judge",
    "likelihood",
    "tied",  # with an answer that says something else; the first of them is kept
    "none right",
    "no reference",
    "none whole",
    "not scored",  # too long for the model that was to score them
]


@dataclass(frozen=True)
class Choice:
    """The place of the answer that is kept, None where none is, and why.

    Args:
        agreeing: whole answers that say the same as the kept one, itself among them.
        margin: to the best of those that say something else, None where none does: in answers (majority),
            points (judge) or nats a token (likelihood).
    """

    place: int | None
    why: Why
    agreeing: int = 0
    margin: float | None = None


def whole_answers(answers: Sequence[Answer]) -> list[int]:
    """Return the places of the answers that may be kept: cut, empty and refused ones may not."""
    return [n for n, answer in enumerate(answers) if answer.finish_reason == "stop" and answer.text]


def choose_answer(
    answers: Sequence[Answer], reference: str, chooser: Chooser, scores: Mapping[int, float] | None = None
) -> Choice:
    """Return which of the whole answers to keep.

    "reference" keeps the first whose final answer is that of the reference (rejection sampling,
    arXiv:2308.01825). "majority" keeps the first of the largest group of answers with the same final answer,
    or the same words where none is named (self-consistency, arXiv:2203.11171). "judge" and "likelihood" keep
    the one of the best score, of equals the first.

    Args:
        scores: by place, of a judge or of the teacher's likelihood; others have no use for them.
    """
    whole = whole_answers(answers)
    if not whole:
        return Choice(None, "none whole")
    if chooser == "reference":
        return _right(answers, whole, reference)
    groups = _groups(answers, whole)
    if chooser == "majority":
        scores = {place: len(group) for group in groups for place in group}
    if not scores:
        return Choice(None, "not scored")
    best = max(scores.values())
    kept = min(place for place, score in scores.items() if score == best)
    same = next(group for group in groups if kept in group)
    others = [score for place, score in scores.items() if place not in same]
    margin = round(best - max(others), 4) if others else None
    return Choice(kept, "tied" if margin == 0 else chooser, len(same), margin)


def _right(answers: Sequence[Answer], whole: Sequence[int], reference: str) -> Choice:
    verdicts = {place: is_right(answers[place].text, reference) for place in whole}
    if None in verdicts.values():
        return Choice(None, "no reference")
    right = [place for place, verdict in verdicts.items() if verdict]
    return Choice(right[0], "right", len(right)) if right else Choice(None, "none right")


def _groups(answers: Sequence[Answer], places: Sequence[int]) -> list[list[int]]:
    """Return the places of answers that say the same, group by group."""
    groups: list[list[int]] = []
    for place in places:
        said = _said(answers[place])
        same = next((group for group in groups if are_equal(_said(answers[group[0]]), said)), None)
        if same is None:
            groups.append([place])
        else:
            same.append(place)
    return groups


def _said(answer: Answer) -> str:
    return final_answer(answer.text) or answer.text
