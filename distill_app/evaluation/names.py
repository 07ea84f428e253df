"""What a comparison calls things: its models, the points between which they are held, students, outcomes.

A student that was refined on its own answers stands beside itself as it was before that: `_words`.
"""

from typing import Literal, NamedTuple

MODELS = {
    "teacher": "Teacher",
    "system1_before": "System 1 before",
    "system1_words": "System 1 on words",
    "system1": "System 1",
    "system2_before": "System 2 before",
    "system2_words": "System 2 on words",
    "system2": "System 2",
}
# What bounds a student's fidelity from below and above
ANCHORS = {
    "system1_other_prompt": "System 1, asked something else",
    "teacher_as_student": "Teacher, asked as the student is",
    "teacher_again": "Teacher, drawn with another seed",
}


class Student(NamedTuple):
    """What a student is for, and which measure tells what distillation gained."""

    title: str
    task: Literal["instructions", "reasoning"]
    gain: str  # key of a measure
    prompts_name: str  # of several prompts


STUDENTS = {
    "system1": Student(MODELS["system1"], "instructions", "agreement", "instructions"),
    "system2": Student(MODELS["system2"], "reasoning", "accuracy", "problems"),
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
