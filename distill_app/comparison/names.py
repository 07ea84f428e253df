"""What a comparison calls things: its models, its students, what they are held against, its outcomes."""

from typing import NamedTuple

MODELS = {
    "teacher": "Teacher",
    "system1_before": "System 1 before",
    "system1": "System 1",
    "system2_before": "System 2 before",
    "system2": "System 2",
}


class Student(NamedTuple):
    """What a student is for, and by which measure it is held against the teacher."""

    title: str
    task: str
    measure: str
    measure_name: str
    prompts_name: str  # of several prompts
    most: float  # what the measure gives a prompt at most
    scale: float  # of the measure as it is written: chrF as it is, shares in percent
    unit: str


STUDENTS = {
    "system1": Student(MODELS["system1"], "instructions", "chrf", "chrF", "prompts", 100, 1, ""),
    "system2": Student(MODELS["system2"], "reasoning", "accuracy", "right answers", "problems", 1, 100, "%"),
}


class Outcome(NamedTuple):
    """How a check ended, for a page, for Markdown and for a terminal; a sign too, not colour alone."""

    says: str
    sign: str
    emoji: str
    colour: str


OUTCOMES = {
    "met": Outcome("met", "✓", "✅", "green"),
    "missed": Outcome("missed", "✗", "❌", "red"),
    "unclear": Outcome("cannot tell", "?", "❔", "yellow"),
}
