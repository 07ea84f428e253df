"""Final answers: what a text names as its result, and whether that equals another text's."""

import contextlib
import io
import itertools
import re

BOXED = re.compile(r"\\boxed\s*\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}")  # braces in it two deep

PHRASE = re.compile(
    r"\b(?:final\s+)?answer(?:\s+is\b|\s*[:=])\s*:?|####|答案\s*(?:是|为|[:：])", re.IGNORECASE
)
AFTERWARDS = re.compile(r"\.(?:\s|$)|[,;]\s+(?=[^\W\d])")  # what follows is said of the answer
NUMBER = re.compile(r"[$€£]?-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?%?")
LONGEST_ANSWER = 200  # characters of an expression that is read as mathematics


def is_right(answer: str, reference: str) -> bool | None:
    """Tell whether the final answer equals the reference's: as mathematics, or as words where it is words.

    A final answer is the last `\\boxed{}`, else what follows the last answer phrase ("the answer is").
    A model's answer without either is its last number; a reference without either, unless it is a number and
    nothing else, has no final answer, and None is returned.
    """
    gold = final_answer(reference)
    if gold is None and NUMBER.fullmatch(reference.strip()):
        gold = reference.strip()
    if not gold:
        return None
    found = final_answer(answer)
    return are_equal(gold, _last_number(answer) if found is None else found)


def final_answer(text: str) -> str | None:
    """Return what a text names as its final answer; None where it names none."""
    if boxes := BOXED.findall(text):
        return _plain(boxes[-1])
    phrases = [text[found.end() :] for found in PHRASE.finditer(text)]
    named = [line for line in (rest.strip().split("\n")[0] for rest in phrases) if line.strip(" .:*")]
    return _plain(AFTERWARDS.split(named[-1].strip())[0]) if named else None


def _plain(answer: str) -> str:
    """Return an answer without the marks around it: a box, text macros, dollars, bold, a percent sign."""
    box = re.fullmatch(r"\\boxed\s*\{(.*)\}", answer.strip(), re.DOTALL)
    answer = re.sub(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}", r" \1", box[1] if box else answer)
    return re.sub(r"\\?[%$]|\*\*|\\[,;!() ]", "", answer).strip(" .:*\n")


def _last_number(text: str) -> str:
    numbers = NUMBER.findall(text)
    return _plain(numbers[-1]) if numbers else ""


def are_equal(gold: str, answer: str) -> bool:
    """Tell whether two final answers are the same words or, as mathematics, the same value."""
    if " ".join(gold.casefold().split()).strip("()") == " ".join(answer.casefold().split()).strip("()"):
        return True
    # To sympy words are products of letters, in which any order is the same
    is_mathematics = all(re.search(r"\d|\\", text) and _is_harmless(text) for text in (gold, answer))
    return is_mathematics and _verify(gold, answer)


def _is_harmless(text: str) -> bool:
    """Tell whether an expression is short, and no tower of powers that would take minutes and memory."""
    powers = text.count("^") + text.count("**") + text.count("!")
    return len(text) <= LONGEST_ANSWER and powers <= 2 and not re.search(r"\d{30}", text)


def _verify(gold: str, answer: str) -> bool:
    """Compare two expressions with math-verify; what its parsers print of bad ones goes nowhere."""
    from math_verify import parse, verify

    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        readings = [
            [parse(text, raise_on_error=False), parse(f"${text}$", raise_on_error=False)]
            for text in (gold, answer)
        ]
        pairs = itertools.product(*readings)
        return any(bool(one and other and verify(one, other, raise_on_error=False)) for one, other in pairs)
