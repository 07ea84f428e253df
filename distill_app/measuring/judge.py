"""Pairs of answers before a judge: any engine, each pair in both orders."""

import re
from collections.abc import Iterator, Sequence
from typing import Literal

from distill_app.labeling.answers import Engine, Sampling
from distill_app.labeling.ask import fill_store, read_answers
from distill_app.labeling.store import AnswerStore

Outcome = Literal["won", "lost", "tied", "unread"]
JUDGE_TOKENS = 8  # it is asked for one letter
WHOLE = re.compile(r"[\W_]*([abc])[\W_]*", re.IGNORECASE)
# Before a word it may be an article or an argument ("A better answer is B"), but for "A is better".
NAMED = re.compile(r"\b([ABC])\b(?=\s*$|\s*[^\w\s'’]|\s+is\s+(?:the\s+)?better\b)", re.MULTILINE)
OUTCOMES: dict[str, tuple[Outcome, Outcome]] = {  # of the answer in place A, and in place B
    "A": ("won", "lost"),
    "B": ("lost", "won"),
    "C": ("tied", "tied"),
}
QUESTION = """\
Which of two answers to a request is better: more helpful, correct and to the point? Their order and length \
do not matter.

Request:
{prompt}

Answer A:
{first}

Answer B:
{second}

Reply with one letter: A, B, or C if they are equally good."""


def judge_pairs(
    engine: Engine, pairs: Sequence[tuple[str, str, str]], store: AnswerStore, label: str
) -> list[tuple[Outcome, Outcome]]:
    """Return how the second answer of each (prompt, teacher's, student's) did against the first.

    Two outcomes a pair, the student's answer in place A and in place B, because judges favour a place
    (Zheng et al. 2023, arXiv:2306.05685). "unread" is a reply that names none of the letters
    or several, or that the judge refused because the pair was too long for it.
    """

    def prompts() -> Iterator[str]:
        for prompt, teacher, student in pairs:
            for first, second in ((student, teacher), (teacher, student)):
                question = QUESTION.format(prompt=prompt, first=first, second=second)
                yield engine.render(question, "", "system1")

    sampling = Sampling(JUDGE_TOKENS)
    fill_store(engine, prompts, sampling, store, total=2 * len(pairs), label=label)
    replies = [answer.text for answer in read_answers(engine, prompts(), sampling, store)]
    return [(_outcome(a, 0), _outcome(b, 1)) for a, b in zip(replies[::2], replies[1::2], strict=True)]


def _outcome(reply: str, place: int) -> Outcome:
    """Read a reply that is a letter, or in which exactly one stands alone in capitals."""
    found = WHOLE.fullmatch(reply)
    if found is None and len(set(re.findall(r"\b[ABC]\b", reply))) == 1:
        found = NAMED.search(reply)
    return OUTCOMES[found[1].upper()][place] if found else "unread"
