"""What held-out data shares with training: texts, runs of words, names and numbers, frames."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_app.core.texts import normalise
from distill_app.data.frames import frame, masked
from distill_app.data.overlap import overlap


def records(*texts: str) -> list[dict[str, str]]:
    return [{"instruction": text, "input": "", "output": "o"} for text in texts]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "Mia has 3 bags of 4 pens. How many pens is that?",
            "Tom has 12 boxes of 7 red shells. How many shells is that?",
        ),
        ("A shop sells 12 pens.", "A farm sells 1,200 eggs."),
        ("Mia has 3 pens. She sells a few of hers.", "Tom has 9 pens. He sells a few of his."),
        ("She has an egg for him.", "He has a pen for her."),
        ("Mia has 3 pens. How many is that?", "MIA HAS 3 pens; how many is that"),
        ("小明有3个苹果。", "小明有15个苹果。"),
    ],
)
def test_problems_with_other_names_numbers_and_things_have_one_frame(one, other):
    assert frame(one) == frame(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Mia has 3 bags of 4 pens.", "Mia fills 3 bags with 4 pens each."),
        ("How many are left?", "How many are there altogether?"),
        ("Mia has 3 pens. She buys 4.", "She buys 4. Mia has 3 pens."),
        ("小明有3个苹果。", "小红有3个苹果。"),
        ("小明有x个苹果，又买了3个。", "求 x 的 3 倍。"),
        ("Der Mann hat 5 Äpfel und kauft 3 Birnen.", "Das Kind malt 7 Bilder."),
        ("Solve: x + 3 = 7.", "Factor y² - 2 = 9."),
        ("Name three fruits.", "Translate this sentence."),
    ],
)
def test_other_wording_is_another_frame(one, other):
    assert frame(one) != frame(other)


@given(st.text())
def test_spellings_that_are_one_text_have_one_frame(text):
    assert frame(normalise(text)) == frame(text)


def test_names_and_numbers_are_masked_and_things_are_not():
    assert masked("Mia has 3 pens.") == masked("Tom has 12 pens.") != masked("Tom has 12 cups.")


def test_a_name_takes_its_pronouns_with_it():
    assert masked("Mia gets 3 pens. She likes them.") == masked("Tom gets 4 pens. He likes them.")


def test_each_kind_of_overlap_is_counted():
    run = "one two three four five six seven eight nine ten eleven twelve thirteen"
    train = records("Mia has 3 pens.", f"He said {run} at last.", "What is it?")
    held_out = records("mia has  3 PENS!", "Tom has 9 pens.", f"{run} and so on", "Why not?")
    found = overlap(iter(train), held_out)
    assert (found.exact, found.ngram, found.masked) == (1, 2, 2)
    assert found.known_frame == [True, True, False, False]


def test_nothing_shared_is_nothing_counted():
    found = overlap(records("a b c"), records("Where to?"))
    assert (found.exact, found.ngram, found.masked, found.known_frame) == (0, 0, 0, [False])
