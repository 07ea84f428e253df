"""Which of several answers to a prompt is kept, and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distill_app.core.final_answers import are_equal, final_answer, is_right
from distill_app.generation.answers import Answer

Chooser = Literal["majority", "reference"]


@dataclass(frozen=True)
class Choice:
    """The place of the answer that is kept, None where none is, and why."""

    place: int | None
    why: Literal["right", "majority", "none right", "no reference", "none whole"]
    agreeing: int = 0  # answers that say the same as the one that is kept


def choose_answer(answers: Sequence[Answer], reference: str, chooser: Chooser) -> Choice:
    """Return which answer to keep; cut, empty and refused ones take no part.

    "reference" keeps the first whose final answer is that of the reference (rejection sampling,
    arXiv:2308.01825). "majority" keeps the first of the largest group of answers with the same final answer,
    or the same words where none is named (self-consistency, arXiv:2203.11171).
    """
    whole = [n for n, answer in enumerate(answers) if answer.finish_reason == "stop" and answer.text]
    if not whole:
        return Choice(None, "none whole")
    if chooser == "reference":
        return _right(answers, whole, reference)
    groups: list[list[int]] = []
    for place in whole:
        said = _said(answers[place])
        same = next((group for group in groups if are_equal(_said(answers[group[0]]), said)), None)
        if same is None:
            groups.append([place])
        else:
            same.append(place)
    largest = max(groups, key=len)  # the first of equals
    return Choice(largest[0], "majority", len(largest))


def _right(answers: Sequence[Answer], whole: Sequence[int], reference: str) -> Choice:
    verdicts = {place: is_right(answers[place].text, reference) for place in whole}
    if None in verdicts.values():
        return Choice(None, "no reference")
    right = [place for place, verdict in verdicts.items() if verdict]
    return Choice(right[0], "right", len(right)) if right else Choice(None, "none right")


def _said(answer: Answer) -> str:
    return final_answer(answer.text) or answer.text
