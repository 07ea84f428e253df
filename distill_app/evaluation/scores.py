"""Scores of single answers: overlap with the teacher, reasoning steps."""

import re

STEP = re.compile(r"=|^\s*(?:step\s*\d+|\d+[.)])", re.IGNORECASE)
FINAL = re.compile(r"\\boxed|\banswer is\b|^\s*answer:", re.IGNORECASE)


def chrf(answer: str, reference: str) -> float:
    """Return the chrF of one answer, 0 to 100 (Popović 2015, as sacrebleu computes it)."""
    from sacrebleu import sentence_chrf

    return round(sentence_chrf(answer, [reference]).score, 2)


def count_steps(answer: str) -> int:
    """Return how many lines or sentences of the answer calculate or are numbered, the final one aside."""
    units = re.split(r"\n+|(?<=[.!?])\s+(?=[A-Z])", answer)
    return sum(1 for unit in units if STEP.search(unit) and not FINAL.search(unit))
