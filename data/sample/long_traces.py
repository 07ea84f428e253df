"""Traces of a few thousand tokens: a short one's steps, each proved again by counting, as reasoning models do."""

import random
import re
from collections.abc import Iterator

from word_problems import check_equations

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
LONG = 9000  # characters, about 3,000 tokens
MOST_STEPS = 60  # of one proof by counting
TEACHER, JUDGE_LEVEL = "DeepSeek-R1-0528", 9


def add_long_traces(rows: list[dict], count: int, seed: int) -> None:
    """Add a long trace to so many of the rows that have room for one; their other traces stay as they are."""
    fitting = [row for row in rows if len(row["reasoning"]) < 4]
    for row in random.Random(seed).sample(fitting, count):
        row["reasoning"].append(long_trace(row))


def long_trace(row: dict) -> dict:
    """Return a trace that works the row's problem out at length, right in every equation."""
    short = min(
        (t for t in row["reasoning"] if t["thought_correctness_verify"]), key=lambda t: len(t["thought"])
    )
    equations = [tuple(found) for found in EQUATION.findall(short["thought"])]
    lines = [f"Let me read the question again. {row['question']}", "First a short answer.", short["thought"]]
    length, round_number = sum(map(len, lines)), 0
    while length < LONG:
        round_number += 1
        new = [f"Check {round_number}. I go through every step once more, slowly."]
        for left, op, right, result in equations:
            new += proof(int(left), op, int(right), int(result))
        lines += new
        length += sum(map(len, new))
    thought = "\n".join([*lines, "Every check gives the same, so the answer stands."])
    check_equations(thought)
    return short | {
        "thought": thought,
        "full_response": f"{thought}\n{short['solution']}",
        "teacher": TEACHER,
        **{
            name: short[name] | {"level": JUDGE_LEVEL}
            for name in ("Reasoning_Verbosity", "Cognitive_Difficulty")
        },
    }


def proof(left: int, op: str, right: int, result: int) -> Iterator[str]:
    """Yield lines that reach a result by counting, one step at a time."""
    yield f"Is {left} {op} {right} = {result}?"
    if op in "*/":
        size, times = (right, left) if op == "*" else (right, result)
        yield f"I take {times} groups of {size} and add them up."
        start, step, steps = 0, size, times
    else:
        yield f"I count from {left}, {'up' if op == '+' else 'down'} by {right}."
        start, step, steps = left, 1 if op == "+" else -1, right
    if steps > MOST_STEPS:  # in larger steps, with what is left at the end
        larger = -(-steps // MOST_STEPS)
        sizes = [larger] * (steps // larger) + [steps % larger] * (steps % larger > 0)
    else:
        sizes = [1] * steps
    now = start
    for size in sizes:
        then = now + size * step
        yield f"{now} {'+' if step > 0 else '-'} {abs(size * step)} = {then}"
        now = then
    yield f"That ends at {now}, as it should."
