"""Stories of things that come and go, put together sentence by sentence, so that hardly two are told alike.

A story has a start, one or two events, sometimes a detail that plays no part, and a question. Each sentence is
drawn from several wordings, so there are thousands of frames, while the steps of a solution are told in the same
few words: what a student has to learn is to read, not to recite.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from word_problems import FOODS, GOODS, PEOPLE, THINGS, TIMES, Earlier, Person, Problem, Step

Number = int | Earlier
Words = tuple[str, ...]

START = (
    "{p} has {n} {item}.",
    "{p} starts with {n} {item}.",
    "There are {n} {item} on the shelf of {p}.",
    "On the desk of {p} there are {n} {item}.",
    "{p} keeps {n} {item} in a box.",
    "{p} counts {n} {item}.",
    "In the morning {p} has {n} {item}.",
    "{p} was given {n} {item} by {o}.",
    "{p} is the owner of {n} {item}.",
    "All in all {n} {item} belong to {p}.",
    "There is a drawer in the kitchen in which {p} has {n} {item}.",
    "Since last week {p} has had {n} {item}.",
    "{p} wants to tell {o} about the {n} {item} that {they} has found.",
)
GROUPS = (
    "{p} has {a} bags with {b} {item} in each.",
    "{p} buys {a} packs of {b} {item}.",
    "There are {a} boxes, and each of them holds {b} {item}.",
    "{a} friends give {p} {b} {item} each.",
    "{p} fills {a} bowls with {b} {item} each.",
    "Each of {a} baskets has {b} {item} in it.",
    "{p} carries {a} trays, with {b} {item} on every tray.",
    "From each of {a} shops {p} brings home {b} {item}.",
    "Between {a} rooms, all of them with {b} {item}, {p} walks up and down.",
    "For {a} days {p} gets {b} {item} a day.",
    "{p} has {b} {item} on each shelf, and there are {a} shelves.",
)
GAIN = (
    "Then {they} buys {k} more.",
    "{o} gives {them} another {k}.",
    "After school {they} finds {k} more {item}.",
    "A neighbor brings {k} more as a present.",
    "The next day {k} more arrive.",
    "{They} gets {k} more from {o}.",
    "To these {they} adds {k}.",
    "Later {o} comes with {k} more {item}.",
    "{k} others were under the bed all the time.",
    "On top of that {they} buys {k} new ones.",
    "When {o} arrives, there are {k} more in the bag.",
    "While {they} is out, {k} more come by post.",
)
LOSE = (
    "{They} gives {k} of them to {o}.",
    "{k} of the {item} get lost on the way home.",
    "Then {they} sells {k} {item}.",
    "{o} takes {k} of them away.",
    "Sadly, {k} of them are spoiled.",
    "{They} hands {k} to a friend.",
    "By the evening {k} are gone.",
    "But {k} of these belong to {o}, who takes them back.",
    "Without thinking {they} leaves {k} of them at the bus stop.",
    "At the end of the day {they} throws out {k}.",
    "Because it rains, {k} of them are lost.",
    "Since {they} does not need all, {k} go to {o}.",
)
GROW = (
    "A year later {they} has {times} as many.",
    "After the summer the number is {times} as large.",
    "Soon there are {times} as many as before.",
    "With the help of {o} it becomes {times} as many.",
)
SHARE = (
    (
        "{They} puts all of them into {m} boxes, the same number in each.",
        ("How many {item} are in each box?", "How many does each box hold?"),
    ),
    (
        "All of these are shared equally among {m} friends.",
        ("How many {item} does each friend get?", "What does one of the friends get?"),
    ),
    (
        "{m} children divide them equally.",
        ("How many are there for each child?", "How many {item} will one child have?"),
    ),
    (
        "{They} sorts them into {m} equal rows.",
        ("How many {item} are in one row?", "How long is each row?"),
    ),
    (
        "They are packed into bags, {m} in each bag.",
        ("How many bags are filled?", "How many bags does {they} need?"),
    ),
)
DETAILS = (
    "It is a rainy day.",
    "{o} is watching.",
    "{p} is {n} years old.",
    "{p} and {o} have been friends for {n} years.",
    "It is {n} o'clock.",
    "Nobody else is at home.",
)
QUESTIONS = (
    "How many {item} does {p} have now?",
    "How many {item} are there in the end?",
    "How many is that?",
    "What is the number of {item} after that?",
    "How many {item} does that make?",
    "Find out how many {item} there are now.",
    "How many of them does {p} have at the end?",
    "Can you say how many {item} that is?",
)
LEFT = (
    "How many {item} are left?",
    "How many remain?",
    "How many {item} does {p} still have?",
    "What is left of them?",
)


class _Event(NamedTuple):
    """A sentence, and the step that goes with it."""

    sentence: str
    op: str
    number: int
    goal: str
    say: str
    questions: Words = QUESTIONS


def _gain(rng: random.Random) -> _Event:
    return _Event(
        rng.choice(GAIN), "+", rng.randint(2, 40), "with the new ones", "With the new ones there are {eq}"
    )


def _lose(rng: random.Random) -> _Event:
    said = "Without those there are {eq}"
    return _Event(rng.choice(LOSE), "-", rng.randint(2, 30), "without those", said, (*LEFT, *QUESTIONS))


def _grow(rng: random.Random) -> _Event:
    return _Event(rng.choice(GROW), "*", rng.randint(2, 4), "after that", "After that there are {eq}")


def _share(rng: random.Random) -> _Event:
    sentence, questions = rng.choice(SHARE)
    goal, said = (
        ("of bags", "The number of bags is {eq}") if "packed" in sentence else ("", "Each part has {eq}")
    )
    return _Event(sentence, "/", rng.randint(2, 9), goal or "in each part", said, questions)


def _events(rng: random.Random, count: int) -> list[Callable[[random.Random], _Event]]:
    """Return so many sorts of events, no two of them the same; things are shared last."""
    chosen = rng.sample([_gain, _lose, _grow, _share], count)
    return sorted(chosen, key=lambda draw: draw is _share)


def told_story(rng: random.Random) -> Problem:
    """Draw a story of two or three steps; `solve` tells whether its numbers fit."""
    p, o = rng.sample(PEOPLE, 2)
    item = rng.choice(THINGS + FOODS + GOODS)
    in_groups = rng.random() < 0.5
    steps: list[Step] = []
    value: Number = rng.randint(5, 60)
    first = rng.choice(GROUPS if in_groups else START)
    numbers = {"a": rng.randint(2, 9), "b": rng.randint(2, 9), "n": value}
    if in_groups:
        said = f"At first there are {{eq}} {item}."
        steps.append(Step(f"the number of {item} at first", numbers["a"], "*", numbers["b"], said))
        value = Earlier(0)
    count = 2 if rng.random() < (0.25 if in_groups else 1.0) else 1
    told = [_fill(first, p, o, item, **numbers)]
    for draw in _events(rng, count):
        event = draw(rng)
        number, times = event.number, TIMES.get(event.number, "")
        told.append(_fill(event.sentence, p, o, item, p.name in told[0], k=number, m=number, times=times))
        thing = "" if event.goal == "of bags" else f" {item}"
        goal = "the number of bags" if event.goal == "of bags" else f"the number of {item} {event.goal}"
        steps.append(Step(goal, value, event.op, event.number, f"{event.say}{thing}."))
        value = Earlier(len(steps) - 1)
    if rng.random() < 0.25:
        told.insert(rng.randint(1, len(told)), _fill(rng.choice(DETAILS), p, o, item, n=rng.randint(4, 12)))
    told.append(_fill(rng.choice(event.questions), p, o, item, p.name in " ".join(told)))
    return Problem(" ".join(told), steps)


def _fill(sentence: str, p: Person, o: Person, item: str, is_known: bool = True, **numbers: object) -> str:
    """Fill in a sentence; who has not been named yet is named in place of a pronoun."""
    them = "her" if p.they == "she" else "him"
    they, They = (p.they, p.they.capitalize()) if is_known else (p.name, p.name)
    them = them if is_known else p.name
    filled = sentence.format(p=p.name, o=o.name, item=item, they=they, They=They, them=them, **numbers)
    return filled[0].upper() + filled[1:]
