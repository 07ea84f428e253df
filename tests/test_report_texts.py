"""Texts of models on their way to a reader: what hides in them is seen, and words that differ are found."""

import pytest

from distill_app.report.texts import clean, differing


def test_what_hides_in_a_text_is_seen_at_any_depth():
    hidden = {"a\x00": ["\x1b[31m", ("\u202eabc\u2066", 1, None)], "b": "one\r\ntwo\ttabs\rthree \ud800\x9b"}
    assert clean(hidden) == {
        "a␀": ["␛[31m", ["⟨U+202E⟩abc⟨U+2066⟩", 1, None]],
        "b": "one\ntwo\ttabs\nthree \ufffd\ufffd",
    }


def test_honest_text_of_any_script_stays_as_it_is():
    text = "שלום مرحبا 我 👩‍👩‍👧 naïve – “quoted”\n\t<b>&amp;"
    assert clean(text) == text


@pytest.mark.parametrize(
    ("text", "other", "marked"),
    [
        ("Two red pears.", "Two green pears.", ["red"]),
        ("Two pears.", "Two green pears.", []),
        ("Two green ripe pears.", "Two green pears.", ["ripe"]),
        ("Nothing of that kind", "Two green pears.", []),  # little in common: marks would be noise
        ("", "Two green pears.", []),
        ("What is left is 90 - 36 = 14.", "What is left is 90 - 36 = 54.", ["14"]),
        ("我喜欢红苹果。", "我喜欢绿苹果。", ["红"]),  # written without spaces
        ("Two  green\n\npears.", "Two green pears.", []),
    ],
)
def test_words_that_differ_are_marked_and_no_character_is_lost(text, other, marked):
    pieces, shared = differing(text, other)
    assert "".join(piece for piece, _ in pieces) == text
    assert [piece for piece, differs in pieces if differs] == marked
    assert shared is not None and 0 <= shared <= 1


def test_answers_of_thousands_of_words_are_shown_without_a_comparison():
    text = "word " * 5000
    assert differing(text, text) == ([(text, False)], None)


def test_answers_that_go_in_circles_are_compared_whole():
    pieces, shared = differing("a b " * 60, "b c " * 60)
    assert "".join(piece for piece, _ in pieces) == "a b " * 60
    assert shared == pytest.approx(0.5)
