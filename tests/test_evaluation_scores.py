import pytest

from distill_app.core.final_answers import is_right
from distill_app.evaluation.scores import chrf, count_steps


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Step 1: 3 + 4 = 7.\nThe answer is \\boxed{7}.", True),
        ("The answer is \\boxed{8}.", False),
        ("First I thought 8, but it is \\boxed{7}. Not 9.", True),
        ("So there are 7 pears left.", True),
        ("It costs $7.00.", True),
        ("I do not know.", False),
        ("", False),
    ],
)
def test_a_final_answer_is_judged_as_mathematics(answer, right):
    assert is_right(answer, "Step 1: 3 + 4 = 7.\nThe answer is \\boxed{7}.") is right


def test_the_last_final_answer_counts():
    for answer in (
        "\\boxed{7} then \\boxed{5}",
        "$\\boxed{\\frac{14}{2}}$, no: $\\boxed{\\frac{10}{2}}$",
        "7, no, 5",
        "The answer is 7. Wait: the answer is 5.",
    ):
        assert is_right(answer, "\\boxed{5}") is True and is_right(answer, "\\boxed{7}") is False
    assert is_right("5", "\\boxed{7}, or rather \\boxed{5}") is True


@pytest.mark.parametrize(
    "reference",
    ["Yes", "Paris", "", "It depends.", "So the number is n * 2 + 1", "There are 3 pens and 4 cups"],
)
def test_a_reference_that_names_no_final_answer_judges_nobody(reference):
    assert is_right("Yes", reference) is None and is_right("I think 3", reference) is None


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("5", "It is 5.", True),  # a number and nothing else
        ("#### 42", "So 42.", True),
        ("9 + 3 = 12\n#### 1,234", "The answer is 1234.", True),
        ("The final answer is: 12 pens.", "\\boxed{12}", True),
        ("**Answer:** 12", "12", True),
        ("答案是 7", "答案：7", True),
        ("\\boxed{\\frac{1}{2}}", "The answer is 0.5", True),
        ("\\boxed{\\frac{1}{2}}", "It is 1/2", True),
        ("\\boxed{50\\%}", "The answer is 50%.", True),
        ("\\boxed{12\\text{ pens}}", "\\boxed{12}", True),
        ("\\boxed{-3}", "The answer is -3.", True),
        ("\\boxed{-3}", "The answer is 3.", False),
        ("\\boxed{$7.00}", "It costs $7.", True),
        ("\\boxed{x^2 + 1}", "\\boxed{1 + x^2}", True),
        ("\\boxed{Tom}", "The answer is tom.", True),
        ("\\boxed{Tom}", "The answer is Mot.", False),
        ("The answer is (B).", "Answer: B", True),
        ("The answer is (B).", "Answer: C", False),
        ("The answer is 7.", "The answer is\n7", True),
        ("\\boxed{12}", "The answer is 12, as 3 * 4 = 12 and not 13.", True),
        ("\\boxed{12}", "The answer is 13. It was 12 before.", False),
    ],
)
def test_final_answers_are_compared_as_what_they_are(reference, answer, right):
    assert is_right(answer, reference) is right


@pytest.mark.parametrize(
    "answer",
    [
        "\\boxed{9**9**9**9}",
        "\\boxed{9^{9^{9^9}}}",
        "\\boxed{" + "(" * 5000 + ")" * 5000 + "}",
        "\\boxed{\\frac{1}{",
        "\\boxed{\\sqrt[}{]$$\\\\}",
        "\\boxed{" + "9" * 10000 + "}",
        "\\boxed{1/0}",
        "\\boxed{\\lim_{x \\to 0} \\int \\sum}",
        "The answer is \ud800.",
        "\\boxed{import os; 1}",
    ],
)
def test_a_hostile_answer_is_wrong_in_silence(answer, capfd):
    assert is_right(answer, "The answer is \\boxed{7}.") is False
    said = capfd.readouterr()
    assert said.out == said.err == ""


@pytest.mark.parametrize(
    ("answer", "steps"),
    [
        ("Step 1: 3 + 4 = 7.\nStep 2: 7 * 2 = 14.\nThe answer is \\boxed{14}.", 2),
        ("3 + 4 = 7. Then 7 * 2 = 14. The answer is 14.", 2),
        ("1. Add them.\n2. Double them.", 2),
        ("The answer is 14.", 0),
        ("14", 0),
        ("", 0),
    ],
)
def test_steps_are_lines_or_sentences_that_calculate(answer, steps):
    assert count_steps(answer) == steps


def test_equal_answers_overlap_fully_and_others_little():
    assert chrf("a red fox", "a red fox") == 100.0
    assert chrf("zzz", "a red fox") < 10
    assert chrf("", "a red fox") == 0
