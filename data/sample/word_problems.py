"""Everyday word problems with exact integer answers, and traces that solve them.

Each kind is a function that draws names and numbers and returns a question with its two or three
arithmetic steps. The traces of a question tell the same steps in different ways: concise, medium,
verbose, by a roundabout calculation, or by algebra; some make a mistake and are marked wrong.
Numbers stay small because a student of 135M parameters learns its arithmetic from these examples.
"""

import random
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

LARGEST_NUMBER = 150
TEACHERS = ("DeepSeek-R1", "DeepSeek-R1-0528", "QwQ-32B")
JUDGE = "sample-generator"  # the levels follow from the template: no model judged them
WRONG_RATE = 0.28  # of the traces after the first of a question: about a sixth of all
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


class Person(NamedTuple):
    name: str
    they: str
    their: str


class Earlier(NamedTuple):
    """Stands for the result of an earlier step, counted from 0."""

    step: int


FIRST, SECOND = Earlier(0), Earlier(1)


class Step(NamedTuple):
    """One calculation: `goal` names what is found, `say` is the sentence around `{eq}`."""

    goal: str
    left: int | Earlier
    op: str
    right: int | Earlier
    say: str


class Problem(NamedTuple):
    question: str
    steps: list[Step]


Kind = Callable[[random.Random], Problem]


class Solved(NamedTuple):
    """A step with its numbers filled in; `result` is wrong where a trace slips."""

    goal: str
    left: int
    op: str
    right: int
    result: int
    say: str

    @property
    def equation(self) -> str:
        return f"{self.left} {self.op} {self.right} = {self.result}"

    @property
    def sentence(self) -> str:
        return self.say.format(eq=self.equation)


class Style(NamedTuple):
    """How a trace is told, with the inclusive bounds of its levels."""

    tell: Callable[[random.Random, str, list[Solved], int], str]
    verbosity: tuple[int, int]
    difficulty: tuple[int, int]


SHE = [
    "Mia",
    "Emma",
    "Olivia",
    "Sara",
    "Lena",
    "Nina",
    "Zoe",
    "Ruth",
    "Grace",
    "Priya",
    "Aisha",
    "Clara",
    "Yuki",
    "Rosa",
]
HE = [
    "Tom",
    "Ben",
    "Omar",
    "Leo",
    "Jack",
    "Ravi",
    "Noah",
    "Paul",
    "Sam",
    "Hugo",
    "Ivan",
    "Felix",
    "Kofi",
    "Daniel",
]
PEOPLE = [Person(n, "she", "her") for n in SHE] + [Person(n, "he", "his") for n in HE]
THINGS = [
    "pens",
    "pencils",
    "stickers",
    "marbles",
    "cards",
    "shells",
    "buttons",
    "beads",
    "stamps",
    "balloons",
    "coins",
    "badges",
    "ribbons",
    "candles",
    "crayons",
    "notebooks",
    "magnets",
    "postcards",
]
FOODS = [
    "apples",
    "oranges",
    "cookies",
    "muffins",
    "plums",
    "pears",
    "cupcakes",
    "peaches",
    "rolls",
    "lemons",
    "bananas",
]
GOODS = [
    "toys",
    "mugs",
    "hats",
    "plants",
    "kites",
    "bowls",
    "lamps",
    "scarves",
    "puzzles",
    "vases",
    "brushes",
]
PLACES = ["shop", "market", "store", "fair", "school", "museum", "club", "library"]
TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}
PARTS = {2: "half", 3: "one third", 4: "one quarter", 5: "one fifth"}


def two_people(rng: random.Random) -> tuple[Person, Person]:
    first, second = rng.sample(PEOPLE, 2)
    return first, second


# The kinds of problems


def shopping_change(rng: random.Random) -> Problem:
    p, item = rng.choice(PEOPLE), rng.choice(GOODS + THINGS)
    count, price, paid = rng.randint(2, 12), rng.randint(2, 9), rng.choice([20, 30, 40, 50, 60, 100])
    question = rng.choice(
        [
            f"{p.name} buys {count} {item} that cost {price} dollars each. {p.they.capitalize()} pays with "
            f"{paid} dollars. How much change does {p.they} get?",
            f"At the market, {item} cost {price} dollars each. {p.name} takes {count} of them and hands over "
            f"{paid} dollars. How many dollars come back?",
            f"{p.name} has {paid} dollars and wants {count} {item}. Each one costs {price} dollars. "
            f"How many dollars will {p.name} have left after buying them?",
        ]
    )
    return Problem(
        question,
        [
            Step(f"the cost of the {item}", count, "*", price, f"The {item} cost {{eq}} dollars."),
            Step("the money that is left", paid, "-", FIRST, "The money left is {eq} dollars."),
        ],
    )


def multi_buy(rng: random.Random) -> Problem:
    p, item = rng.choice(PEOPLE), rng.choice(THINGS + FOODS)
    size, packs, price = rng.randint(2, 10), rng.randint(2, 9), rng.randint(2, 12)
    need = size * packs
    question = rng.choice(
        [
            f"A pack of {size} {item} costs {price} dollars. {p.name} needs {need} {item} for a party. "
            f"How much does {p.they} pay in all?",
            f"The shop sells {item} only in bags of {size}. One bag costs {price} dollars. How many dollars does "
            f"{p.name} need for {need} {item}?",
            f"{p.name} wants {need} {item}. They come in boxes of {size}, and each box costs {price} dollars. "
            f"What is the total price?",
        ]
    )
    return Problem(
        question,
        [
            Step("the number of packs", need, "/", size, "The number of packs is {eq}."),
            Step("the total price", FIRST, "*", price, "The packs cost {eq} dollars."),
        ],
    )


def rate_and_time(rng: random.Random) -> Problem:
    p, item = rng.choice(PEOPLE), rng.choice(GOODS + FOODS)
    rate, hours, other = rng.randint(3, 15), rng.randint(2, 9), rng.randint(2, 20)
    verb = "bakes" if item in ("cookies", "muffins", "cupcakes", "rolls") else "packs"
    more, question = rng.choice(
        [
            (
                False,
                f"{p.name} {verb} {rate} {item} every hour and works for {hours} hours. Then {p.they} sells "
                f"{other} of them. How many {item} are left?",
            ),
            (
                True,
                f"{p.name} {verb} {rate} {item} an hour. There are already {other} {item} on the shelf. "
                f"How many {item} will there be after {hours} hours?",
            ),
            (
                False,
                f"In one hour {p.name} {verb} {rate} {item}. After {hours} hours, {other} of the {item} are "
                f"found to be damaged. How many good {item} remain?",
            ),
            (
                True,
                f"A team starts the day with {other} {item}. It {verb} {rate} more each hour for {hours} hours. "
                f"How many {item} does it have now?",
            ),
        ]
    )
    last = (
        Step(f"the number of {item} in all", FIRST, "+", other, f"Together that is {{eq}} {item}.")
        if more
        else Step(f"the number of {item} left", FIRST, "-", other, f"The rest is {{eq}} {item}.")
    )
    return Problem(
        question,
        [
            Step(
                f"the {item} from {hours} hours", rate, "*", hours, f"In {hours} hours that is {{eq}} {item}."
            ),
            last,
        ],
    )


def distance(rng: random.Random) -> Problem:
    p = rng.choice(PEOPLE)
    first, second = (rng.randint(4, 18), rng.randint(2, 5)), (rng.randint(3, 12), rng.randint(2, 5))
    extra = rng.randint(3, 20)
    leg = Step("the first distance", first[0], "*", first[1], "The first distance is {eq} km.")
    two_legs = [
        leg,
        Step("the second distance", second[0], "*", second[1], "The second distance is {eq} km."),
        Step("the whole distance", FIRST, "+", SECOND, "The whole distance is {eq} km."),
    ]
    ahead = first[0] * first[1] + extra
    remaining = [leg, Step("the distance that is left", ahead, "-", FIRST, "The distance left is {eq} km.")]
    question, steps = rng.choice(
        [
            (
                f"{p.name} cycles at {first[0]} km per hour for {first[1]} hours, then walks at {second[0]} km per hour "
                f"for {second[1]} hours. How many km is that in all?",
                two_legs,
            ),
            (
                f"A boat sails at {first[0]} km per hour for {first[1]} hours and then at {second[0]} km per hour for "
                f"{second[1]} hours. How far does it go?",
                two_legs,
            ),
            (
                f"A lake is {ahead} km away. {p.name} rides towards it at {first[0]} km per hour for {first[1]} hours. "
                f"How many km are left?",
                remaining,
            ),
            (
                f"{p.name} plans a trip of {ahead} km and travels at {first[0]} km per hour. "
                f"How far is it still to go after {first[1]} hours?",
                remaining,
            ),
        ]
    )
    return Problem(question, steps)


def sharing(rng: random.Random) -> Problem:
    p, item = rng.choice(PEOPLE), rng.choice(THINGS + FOODS)
    friends, each = rng.randint(2, 9), rng.randint(2, 9)
    have = rng.randint(2, max(2, friends * each - 2))
    more = friends * each - have
    question = rng.choice(
        [
            f"{p.name} has {have} {item} and gets {more} more. {p.they.capitalize()} shares them all equally among "
            f"{friends} friends. How many does each friend get?",
            f"There are {have} {item} in a box and {more} {item} in a bag. They are put equally on {friends} plates. "
            f"How many are on each plate?",
            f"{p.name} finds {have} {item} in the morning and {more} in the evening. {friends} children share them "
            f"equally. How many {item} does each child get?",
        ]
    )
    return Problem(
        question,
        [
            Step(f"the number of {item} in all", have, "+", more, f"Together there are {{eq}} {item}."),
            Step("one equal share", FIRST, "/", friends, f"Each share is {{eq}} {item}."),
        ],
    )


def ages(rng: random.Random) -> Problem:
    a, b = two_people(rng)
    age, gap, years, times = rng.randint(4, 20), rng.randint(2, 9), rng.randint(2, 15), rng.randint(2, 4)
    later = Step(
        f"the age of {b.name} in {years} years",
        FIRST,
        "+",
        years,
        f"In {years} years {b.name} will be {{eq}} years old.",
    )
    earlier = Step(
        f"the age of {b.name} {years} years ago",
        FIRST,
        "-",
        years,
        f"{b.name} was {{eq}} years old {years} years ago.",
    )
    older = Step(f"the age of {b.name} now", age, "+", gap, f"{b.name} is {{eq}} years old now.")
    younger = Step(f"the age of {b.name} now", age, "-", gap, f"{b.name} is {{eq}} years old now.")
    multiple = Step(f"the age of {b.name} now", age, "*", times, f"{b.name} is {{eq}} years old now.")
    question, steps = rng.choice(
        [
            (
                f"{a.name} is {age} years old. {b.name} is {gap} years older than {a.name}. "
                f"How old will {b.name} be in {years} years?",
                [older, later],
            ),
            (
                f"{b.name} is {gap} years younger than {a.name}, who is {age} years old. "
                f"What will the age of {b.name} be {years} years from now?",
                [younger, later],
            ),
            (
                f"{a.name} is {age} years old, and {b.name} is {TIMES[times]} as old as {a.name}. "
                f"How old was {b.name} {years} years ago?",
                [multiple, earlier],
            ),
            (
                f"Today {a.name} turns {age}. {b.name} is {TIMES[times]} as old. "
                f"How old will {b.name} be after {years} more years?",
                [multiple, later],
            ),
        ]
    )
    return Problem(question, steps)


def perimeter_and_area(rng: random.Random) -> Problem:
    p = rng.choice(PEOPLE)
    length, part = rng.randint(4, 18), rng.randint(2, 15)
    width = rng.randint(2, min(9, length))
    around = [
        Step("the length plus the width", length, "+", width, "Length plus width is {eq} meters."),
        Step("the way around", FIRST, "*", 2, "All four sides together are {eq} meters."),
    ]
    area = Step("the whole area", length, "*", width, "The whole area is {eq} square meters.")
    rest = [area, Step("the area that is left", FIRST, "-", part, "The area left is {eq} square meters.")]
    question, steps = rng.choice(
        [
            (
                f"{p.name} has a garden that is {length} meters long and {width} meters wide. "
                f"How many meters of fence go all the way around it?",
                around,
            ),
            (
                f"A rectangular field is {length} meters long and {width} meters wide. {p.name} walks around it once. "
                f"How many meters is that?",
                around,
            ),
            (
                f"A room is {length} meters long and {width} meters wide. A rug covers {part} square meters. "
                f"How many square meters of floor stay bare?",
                rest,
            ),
            (
                f"{p.name} paints a wall that is {length} meters long and {width} meters high. {part} square meters are "
                f"windows. How many square meters need paint?",
                rest,
            ),
        ]
    )
    return Problem(question, steps)


def fraction(rng: random.Random) -> Problem:
    a, b = two_people(rng)
    item, parts = rng.choice(THINGS + FOODS), rng.randint(2, 5)
    total, extra = parts * rng.randint(2, 12), rng.randint(2, 12)
    part = Step(
        f"{PARTS[parts]} of {total}", total, "/", parts, f"{PARTS[parts].capitalize()} of {total} is {{eq}}."
    )
    left = Step(f"the number of {item} left", total, "-", FIRST, f"That leaves {{eq}} {item}.")
    joined = Step(f"the {item} that {b.name} has now", FIRST, "+", extra, f"{b.name} now has {{eq}} {item}.")
    question, steps = rng.choice(
        [
            (
                f"{a.name} has {total} {item} and gives {PARTS[parts]} of them to {b.name}. "
                f"How many {item} does {a.name} have left?",
                [part, left],
            ),
            (
                f"There are {total} {item} in a basket, and {PARTS[parts]} of them are red. "
                f"How many of the {item} are not red?",
                [part, left],
            ),
            (
                f"{b.name} has {extra} {item}. {a.name} gives {b.name} {PARTS[parts]} of {a.their} {total} {item}. "
                f"How many {item} does {b.name} have now?",
                [part, joined],
            ),
        ]
    )
    return Problem(question, steps)


def percent(rng: random.Random) -> Problem:
    p, item, place = rng.choice(PEOPLE), rng.choice(THINGS + GOODS), rng.choice(PLACES)
    tens, total = rng.choice([2, 3, 4, 6, 7, 8]), rng.choice([20, 30, 40, 50, 60, 70, 80, 90, 100])
    share = tens * 10
    tenth = Step("10 percent", total, "/", 10, f"10 percent of {total} is {{eq}}.")
    part = Step(f"{share} percent", FIRST, "*", tens, f"{share} percent of {total} is {{eq}}.")
    left = Step("what is left", total, "-", SECOND, "What is left is {eq}.")
    question, steps = rng.choice(
        [
            (
                f"A coat in the shop costs {total} dollars. Today its price is {share} percent lower. "
                f"How many dollars does {p.name} pay for it?",
                [tenth, part, left],
            ),
            (
                f"{p.name} has {total} {item} and sells {share} percent of them at the {place}. "
                f"How many {item} does {p.they} still have?",
                [tenth, part, left],
            ),
            (
                f"There are {total} people at the {place}, and {share} percent of them are children. "
                f"How many children are at the {place}?",
                [tenth, part],
            ),
            (
                f"{p.name} counts {total} {item} in the {place}. {share} percent of the {item} are blue. "
                f"How many blue {item} are there?",
                [tenth, part],
            ),
        ]
    )
    return Problem(question, steps)


def add_and_subtract(rng: random.Random) -> Problem:
    p, item, place = rng.choice(PEOPLE), rng.choice(THINGS + FOODS), rng.choice(PLACES)
    a, b, c, d = rng.randint(8, 40), rng.randint(3, 20), rng.randint(2, 18), rng.randint(2, 12)
    question, noun, signs = rng.choice(
        [
            (
                f"A bus has {a} people on it. At the {place} {b} people get off and {c} get on. At the next stop {d} more "
                f"get on. How many people are on the bus?",
                "people",
                "-++",
            ),
            (
                f"{p.name} has {a} {item}. {p.they.capitalize()} finds {b} more, gives away {c} and loses {d}. "
                f"How many {item} does {p.they} have now?",
                item,
                "+--",
            ),
            (
                f"There are {a} {item} in the {place}. In the morning {b} are sold, and at noon {c} new ones arrive. "
                f"How many {item} are there now?",
                item,
                "-+",
            ),
            (
                f"{p.name} starts a game with {a} points, wins {b} points and then loses {c} points. "
                f"How many points does {p.they} have at the end?",
                "points",
                "+-",
            ),
        ]
    )
    steps: list[Step] = []
    for number, (sign, amount) in enumerate(zip(signs, (b, c, d), strict=False)):
        before = Earlier(number - 1) if number else a
        word = "more" if sign == "+" else "fewer"
        steps.append(
            Step(
                f"the number after {amount} {word}",
                before,
                sign,
                amount,
                f"With {amount} {word} there are {{eq}} {noun}.",
            )
        )
    return Problem(question, steps)


def comparison(rng: random.Random) -> Problem:
    a, b = two_people(rng)
    item = rng.choice(THINGS + FOODS)
    have, gap, times = rng.randint(3, 20), rng.randint(2, 15), rng.randint(2, 5)
    op, number, question = rng.choice(
        [
            (
                "+",
                gap,
                f"{a.name} has {have} {item}. {b.name} has {gap} more {item} than {a.name}. "
                f"How many {item} do they have together?",
            ),
            (
                "*",
                times,
                f"{a.name} collects {have} {item}, and {b.name} collects {TIMES[times]} as many. "
                f"How many {item} do the two collect together?",
            ),
            (
                "-",
                gap,
                f"{a.name} sold {have} {item} on Monday. {b.name} sold {gap} fewer than {a.name}. "
                f"How many {item} did they sell in all?",
            ),
            (
                "*",
                times,
                f"{b.name} found {TIMES[times]} as many {item} as {a.name}, who found {have}. "
                f"What is the total number of {item} they found?",
            ),
        ]
    )
    return Problem(
        question,
        [
            Step(f"the {item} of {b.name}", have, op, number, f"{b.name} has {{eq}} {item}."),
            Step(f"the {item} of both", have, "+", FIRST, f"Together that is {{eq}} {item}."),
        ],
    )


def saving(rng: random.Random) -> Problem:
    p, item = (
        rng.choice(PEOPLE),
        rng.choice(["bike", "game", "camera", "tent", "guitar", "jacket", "watch", "tablet", "skateboard"]),
    )
    have, week, weeks = rng.randint(2, 20), rng.randint(2, 12), rng.randint(2, 10)
    price = have + week * weeks
    saved = [
        Step(
            "the money saved each week in all", week, "*", weeks, f"In {weeks} weeks that is {{eq}} dollars."
        ),
        Step("all the money", FIRST, "+", have, "With the first money that is {eq} dollars."),
    ]
    needed = [
        Step("the money that is missing", price, "-", have, "The money still missing is {eq} dollars."),
        Step("the number of weeks", FIRST, "/", week, "The saving takes {eq} weeks."),
    ]
    question, steps = rng.choice(
        [
            (
                f"{p.name} has {have} dollars and saves {week} dollars every week. "
                f"How many dollars does {p.they} have after {weeks} weeks?",
                saved,
            ),
            (
                f"For a {item}, {p.name} puts {week} dollars in a jar each week for {weeks} weeks. The jar already held "
                f"{have} dollars. How much is in it now?",
                saved,
            ),
            (
                f"{p.name} wants a {item} for {price} dollars and already has {have} dollars. "
                f"{p.they.capitalize()} saves {week} dollars a week. How many weeks does it take?",
                needed,
            ),
            (
                f"A {item} costs {price} dollars. {p.name} has {have} dollars and earns {week} dollars each week. "
                f"After how many weeks can {p.they} buy it?",
                needed,
            ),
        ]
    )
    return Problem(question, steps)


def pages_read(rng: random.Random) -> Problem:
    p, day = rng.choice(PEOPLE), rng.choice(["Monday", "Tuesday", "Friday", "Saturday", "Sunday"])
    rate, days, rest = rng.randint(3, 15), rng.randint(2, 8), rng.randint(3, 30)
    pages, more = rate * days + rest, rng.randint(2, 15)
    read = Step(f"the pages read in {days} days", rate, "*", days, f"In {days} days that is {{eq}} pages.")
    left = [read, Step("the pages that are left", pages, "-", FIRST, "There are {eq} pages left.")]
    joined = [read, Step("the pages in all", FIRST, "+", more, "In all that is {eq} pages.")]
    question, steps = rng.choice(
        [
            (
                f"{p.name} reads {rate} pages of a book each day. The book has {pages} pages. "
                f"How many pages are left after {days} days?",
                left,
            ),
            (
                f"A book has {pages} pages. Starting on {day}, {p.name} reads {rate} pages a day for {days} days. "
                f"How many pages has {p.they} still to read?",
                left,
            ),
            (
                f"{p.name} reads {rate} pages every evening for {days} evenings and {more} more pages on {day}. "
                f"How many pages does {p.they} read in all?",
                joined,
            ),
        ]
    )
    return Problem(question, steps)


def recipe(rng: random.Random) -> Problem:
    p = rng.choice(PEOPLE)
    dish = rng.choice(["soup", "salad", "stew", "pie", "pizza", "curry"])
    part = rng.choice(["tomatoes", "peppers", "carrots", "onions", "potatoes", "mushrooms"])
    people, times, amount, have = rng.randint(2, 6), rng.randint(2, 6), rng.randint(2, 9), rng.randint(2, 9)
    guests = people * times
    scale = [
        Step("how many times the recipe is made", guests, "/", people, "The recipe is made {eq} times."),
        Step(f"the {part} for {guests} people", FIRST, "*", amount, f"That needs {{eq}} {part}."),
    ]
    buy = [*scale, Step(f"the {part} to buy", SECOND, "-", have, f"The number to buy is {{eq}} {part}.")]
    question, steps = rng.choice(
        [
            (
                f"A {dish} recipe for {people} people needs {amount} {part}. {p.name} cooks for {guests} people. "
                f"How many {part} does {p.they} need?",
                scale,
            ),
            (
                f"{p.name} uses {amount} {part} to make {dish} for {people} people. "
                f"How many {part} are needed to make it for {guests} people?",
                scale,
            ),
            (
                f"{dish.capitalize()} for {people} people takes {amount} {part}. {p.name} expects {guests} people and has "
                f"{have} {part}. How many more {part} must {p.they} buy?",
                buy,
            ),
        ]
    )
    return Problem(question, steps)


def average(rng: random.Random) -> Problem:
    p, item = rng.choice(PEOPLE), rng.choice(THINGS + FOODS)
    mean, a, b = rng.randint(4, 20), rng.randint(2, 24), rng.randint(2, 24)
    c = 3 * mean - a - b
    question, noun = rng.choice(
        [
            (
                f"{p.name} scores {a}, {b} and {c} points in three games. "
                f"What is the average number of points that {p.they} scores per game?",
                "points",
            ),
            (
                f"On three days {p.name} sells {a}, {b} and {c} {item}. "
                f"How many {item} is that per day on average?",
                item,
            ),
            (
                f"Three boxes hold {a}, {b} and {c} {item}. {p.name} wants to know the average. "
                f"How many {item} does a box hold on average?",
                item,
            ),
        ]
    )
    return Problem(
        question,
        [
            Step("the sum of the first two numbers", a, "+", b, f"The first two make {{eq}} {noun}."),
            Step("the sum of all three numbers", FIRST, "+", c, f"All three make {{eq}} {noun}."),
            Step("the average", SECOND, "/", 3, f"The average is {{eq}} {noun}."),
        ],
    )


def tickets_and_coins(rng: random.Random) -> Problem:
    p, place = (
        rng.choice(PEOPLE),
        rng.choice(["zoo", "museum", "cinema", "theater", "circus", "pool", "fair", "castle"]),
    )
    big, small = rng.randint(2, 9), rng.randint(2, 12)
    dear, cheap = rng.randint(5, 12), rng.randint(2, 6)
    (first, second), (price, other), unit, question = rng.choice(
        [
            (
                ("adult tickets", "child tickets"),
                (dear, cheap),
                "dollars",
                f"At the {place} a ticket costs {dear} dollars for adults and {cheap} dollars for children. "
                f"How much do {big} adults and {small} children pay together?",
            ),
            (
                ("front seats", "back seats"),
                (dear, cheap),
                "dollars",
                f"{p.name} sells {big} front seats at {dear} dollars each and {small} back seats at {cheap} dollars each. "
                f"How many dollars does {p.they} take in?",
            ),
            (
                ("dimes", "nickels"),
                (10, 5),
                "cents",
                f"{p.name} has {big} dimes and {small} nickels. A dime is 10 cents and a nickel is 5 cents. "
                f"How many cents does {p.they} have?",
            ),
            (
                ("dimes", "nickels"),
                (10, 5),
                "cents",
                f"A dime is worth 10 cents and a nickel 5 cents. How many cents are {big} dimes and {small} nickels "
                f"in the jar of {p.name}?",
            ),
        ]
    )
    return Problem(
        question,
        [
            Step(f"the value of the {first}", big, "*", price, f"The {first} make {{eq}} {unit}."),
            Step(f"the value of the {second}", small, "*", other, f"The {second} make {{eq}} {unit}."),
            Step("the total", FIRST, "+", SECOND, f"Together that is {{eq}} {unit}."),
        ],
    )


KINDS = (
    shopping_change,
    multi_buy,
    rate_and_time,
    distance,
    sharing,
    ages,
    perimeter_and_area,
    fraction,
    percent,
    add_and_subtract,
    comparison,
    saving,
    pages_read,
    recipe,
    average,
    tickets_and_coins,
)


# Solving


def calculate(left: int, op: str, right: int) -> int | None:
    """Return the exact result, or None where a division leaves a rest."""
    if op == "/":
        return left // right if left % right == 0 else None
    return {"+": left + right, "-": left - right, "*": left * right}[op]


def solve(steps: list[Step], slip: tuple[int, int] | None = None) -> list[Solved] | None:
    """Fill in the steps; None where a number leaves 2 to LARGEST_NUMBER or is not whole.

    Args:
        steps: in the order of the calculation.
        slip: a step's index and what is added to its result, for a trace that miscalculates.
    """
    solved: list[Solved] = []
    for index, step in enumerate(steps):
        left = solved[step.left.step].result if isinstance(step.left, Earlier) else step.left
        right = solved[step.right.step].result if isinstance(step.right, Earlier) else step.right
        result = calculate(left, step.op, right)
        if result is not None and slip is not None and slip[0] == index:
            result += slip[1]
        if result is None or min(left, right, result) < 2 or max(left, right, result) > LARGEST_NUMBER:
            return None
        solved.append(Solved(step.goal, left, step.op, right, result, step.say))
    return solved


def solve_wrongly(rng: random.Random, steps: list[Step], answer: int, may_slip: bool) -> list[Solved] | None:
    """Return the steps with one slip or one wrong operation and another answer; None if none fits."""
    candidates: list[list[Solved] | None] = []
    for index, step in enumerate(steps):
        for op in {"+": "-", "-": "+", "*": "+", "/": "-"}[step.op]:
            candidates.append(solve([*steps[:index], step._replace(op=op), *steps[index + 1 :]]))
        if may_slip:
            candidates += [solve(steps, (index, error)) for error in (-10, -2, -1, 1, 2, 10)]
    wrong = [solved for solved in candidates if solved and solved[-1].result != answer]
    return rng.choice(wrong) if wrong else None


# Telling


def is_true(step: Solved) -> bool:
    return calculate(step.left, step.op, step.right) == step.result


def spell_out(step: Solved) -> str:
    verb = {
        "+": "add {1} to {0}",
        "-": "subtract {1} from {0}",
        "*": "multiply {0} by {1}",
        "/": "divide {0} by {1}",
    }
    return verb[step.op].format(step.left, step.right)


def check(step: Solved) -> str:
    """Return the inverse calculation; for a slip, a check that overlooks it."""
    if not is_true(step):
        return "I went over it once more and it looks fine."
    inverse = {"+": "-", "-": "+", "*": "/", "/": "*"}[step.op]
    return f"Going backwards, {step.result} {inverse} {step.right} = {step.left}, so it fits."


def tell_concise(_rng: random.Random, _question: str, steps: list[Solved], _level: int) -> str:
    return "\n".join(f"Step {number}: {step.sentence}" for number, step in enumerate(steps, start=1))


def tell_medium(rng: random.Random, _question: str, steps: list[Solved], level: int) -> str:
    opening = rng.choice(
        [
            "Let us work through this in order.",
            "We can solve this one part at a time.",
            "The text gives all the numbers we need.",
        ]
    )
    lines = [opening] if level > 4 else []
    for number, step in enumerate(steps):
        start = "First" if number == 0 else rng.choice(["Next", "Then", "After that"])
        if number == len(steps) - 1:
            start = "Finally"
        reason = f" To get it, we {spell_out(step)}." if level > 5 or number == 0 else ""
        lines.append(f"{start}, we need {step.goal}.{reason} {step.sentence}")
    return "\n".join(lines)


def tell_verbose(rng: random.Random, question: str, steps: list[Solved], level: int) -> str:
    doubts = ["Wait, let me check that.", "Hmm, is that right?", "Hold on, let me make sure."]
    lines = [
        f"{rng.choice(['Okay', 'Alright', 'Hmm'])}, let me read the problem carefully. {question}",
        f"So in the end I have to find {steps[-1].goal}. Before that I should sort out what is given.",
    ]
    for number, step in enumerate(steps):
        start = (
            "I begin with" if number == 0 else rng.choice(["Now I turn to", "The next thing is", "Now comes"])
        )
        lines.append(f"{start} {step.goal}. I think I should {spell_out(step)}. {step.sentence}")
        if level > 7 or number == len(steps) - 1:
            lines.append(f"{rng.choice(doubts)} {check(step)}")
    if level > 8:
        again = ", then ".join(step.equation for step in steps)
        lines.append(f"Let me go through everything one more time to be sure: {again}. Nothing has changed.")
    lines.append(
        rng.choice(
            ["So I am confident about", "That settles it, I am happy with", "Everything agrees, so I go with"]
        )
        + f" {steps[-1].result}."
    )
    return "\n".join(lines)


def roundabout(step: Solved) -> str:
    """Return a needlessly long calculation of a true step, each of its equations true."""
    a, b, result = step.left, step.right, step.result
    if step.op in "+-":
        half = calculate(a, step.op, b // 2)
        return (
            f"I split {b} into {b // 2} and {b - b // 2}. {a} {step.op} {b // 2} = {half}, "
            f"and {half} {step.op} {b - b // 2} = {result}."
        )
    if step.op == "/":
        return (
            f"I try multiples of {b}. {b} * {result - 1} = {b * (result - 1)} is too small, "
            f"but {b} * {result} = {a} fits."
        )
    if b <= 5:
        sums = [f"{a * n} + {a} = {a * (n + 1)}" for n in range(1, b)]
        return f"I add {a} again and again. {', '.join(sums)}."
    return (
        f"I split {b} into {b - 2} and 2. {a} * {b - 2} = {a * (b - 2)}, {a} * 2 = {a * 2}, "
        f"and {a * (b - 2)} + {a * 2} = {result}."
    )


def tell_roundabout(_rng: random.Random, _question: str, steps: list[Solved], level: int) -> str:
    lines = ["I do not trust my mental arithmetic here, so I take small pieces."] if level > 5 else []
    for step in steps:
        lines.append(f"Looking for {step.goal}: {roundabout(step)} {step.sentence}")
    return "\n".join(lines)


def tell_algebra(_rng: random.Random, _question: str, steps: list[Solved], level: int) -> str:
    lines = ["I translate the text into equations with unknowns and solve them in turn."] if level > 6 else []
    for step, x in zip(steps, "xyz", strict=False):
        a, b = step.left, step.right
        relation = {
            "+": f"{x} - {b} = {a}",
            "-": f"{x} + {b} = {a}",
            "*": f"{x} / {b} = {a}",
            "/": f"{x} * {b} = {a}",
        }
        lines.append(
            f"Let {x} be {step.goal}. It satisfies {relation[step.op]}. "
            f"Solving for {x} gives {step.equation}, so {x} = {step.result}."
        )
    lines.append(f"The unknown that the question asks for is {'xyz'[len(steps) - 1]} = {steps[-1].result}.")
    return "\n".join(lines)


CONCISE = Style(tell_concise, (1, 3), (1, 3))
MEDIUM = Style(tell_medium, (4, 6), (2, 4))
VERBOSE = Style(tell_verbose, (7, 9), (3, 6))
ROUNDABOUT = Style(tell_roundabout, (5, 7), (4, 7))
ALGEBRA = Style(tell_algebra, (5, 8), (6, 9))


# Rows


def trace_record(rng: random.Random, question: str, steps: list[Solved], style: Style, correct: bool) -> dict:
    """Return one struct of OmniThought's `reasoning` column."""
    verbosity, difficulty = rng.randint(*style.verbosity), rng.randint(*style.difficulty)
    if style is CONCISE:  # three steps are more to read and to follow than two
        verbosity, difficulty = (
            rng.randint(len(steps) - 1, len(steps)),
            rng.randint(len(steps) - 1, len(steps)),
        )
    thought = style.tell(rng, question, steps, verbosity)
    if correct:
        check_equations(thought)
    solution = f"The answer is \\boxed{{{steps[-1].result}}}."
    return {
        "thought": thought,
        "solution": solution,
        "full_response": f"{thought}\n{solution}",
        "teacher": rng.choice(TEACHERS),
        "thought_correctness_verify": correct,
        "Reasoning_Verbosity": {"judge": JUDGE, "level": verbosity},
        "Cognitive_Difficulty": {"judge": JUDGE, "level": difficulty},
    }


def check_equations(text: str) -> None:
    """Assert that every `a op b = c` in a correct trace holds and that there is one."""
    equations = EQUATION.findall(text)
    assert equations, f"no equation in: {text}"
    for left, op, right, result in equations:
        assert calculate(int(left), op, int(right)) == int(result), (
            f"{left} {op} {right} = {result} in: {text}"
        )


def trace_records(rng: random.Random, problem: Problem, solved: list[Solved]) -> list[dict]:
    """Return 2 to 4 traces in shuffled order; one of them is concise and correct."""
    traces = [trace_record(rng, problem.question, solved, CONCISE, correct=True)]
    for style in rng.sample([MEDIUM, VERBOSE, ROUNDABOUT, ALGEBRA], rng.choice([1, 2, 2, 3])):
        wrong = None
        if rng.random() < WRONG_RATE:
            style = rng.choice([style, CONCISE])
            wrong = solve_wrongly(rng, problem.steps, solved[-1].result, may_slip=style is not ROUNDABOUT)
        if wrong is None and style is CONCISE:
            style = MEDIUM
        trace = trace_record(rng, problem.question, wrong or solved, style, correct=wrong is None)
        if all(trace["thought"] != other["thought"] for other in traces):
            traces.append(trace)
    rng.shuffle(traces)
    return traces


def word_problem_rows(seed: int, counts: Mapping[Kind, int]) -> list[dict]:
    """Return OmniThought rows (`question`, `reasoning`), so many of each kind, shuffled.

    No two questions are the same, and the same arguments give the same rows.
    """
    rng = random.Random(seed)
    rows: dict[str, dict] = {}
    for kind, count in counts.items():
        enough = len(rows) + count
        while len(rows) < enough:
            problem = kind(rng)
            solved = solve(problem.steps)
            if solved is None or problem.question in rows:
                continue
            rows[problem.question] = {
                "question": problem.question,
                "reasoning": trace_records(rng, problem, solved),
            }
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled
