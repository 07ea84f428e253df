"""White space in our columns is white space in Python, and every value says what it said."""

import math
import sys
from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distill_app.data.cells import (
    NOT_TEXT,
    collapsed,
    has_nul,
    identities,
    is_blank,
    is_not_text,
    marks,
    numbers,
    texts,
)

LETTERS = [chr(code) for code in range(1, sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
TEXTS = st.lists(
    st.lists(st.sampled_from(["a", "b", " ", "\n", "  ", "\u200b", "\0", "\u3000", "é", "\x1c"])).map("".join)
)


def column(values: list) -> pa.Array:
    return pa.array(["before", *values, "after"], pa.large_string())[1:-1]


@pytest.mark.slow
def test_every_white_space_of_python_and_no_other_letter_is_blank() -> None:
    found = is_blank(column(LETTERS))
    assert [letter for letter, blank in zip(LETTERS, found, strict=True) if blank] == [
        letter for letter in LETTERS if letter.isspace()
    ]


@settings(deadline=None)
@given(TEXTS)
@example(["\n", " a \n b\n", ""])
def test_columns_of_texts_are_looked_at_as_python_looks_at_each(values: list[str]) -> None:
    every = column(values)
    assert collapsed(every).to_pylist() == [" ".join(text.split()) for text in values]
    assert is_blank(every).tolist() == [not text.strip() for text in values]
    assert has_nul(every).tolist() == ["\0" in text for text in values]
    ids = identities(every)
    assert [ids[0] == one for one in ids] == [values[0] == text for text in values]


def test_null_is_blank_and_holds_no_nul() -> None:
    every = column([None, "a", None])
    assert is_blank(every).tolist() == [True, False, True] and not has_nul(every).any()


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_texts_are_texts_however_they_lie_in_memory(kind: pa.DataType) -> None:
    found = texts(pa.array(["a", None, "a"], pa.string()).cast(kind))
    assert found.type == pa.large_string() and found.to_pylist() == ["a", None, "a"]


@pytest.mark.parametrize("values", [[1, None], [[1], None], [{"a": "b"}, None], [True, None]])
def test_what_is_no_text_is_marked_and_null_stays_null(values: list) -> None:
    found = texts(pa.array(values))
    assert found.to_pylist() == [NOT_TEXT, None] and is_not_text(found).tolist() == [True, False]


def test_numbers_and_marks_are_read_whatever_the_type() -> None:
    assert numbers(pa.array([1.5, math.nan, None])).to_pylist() == [1.5, None, None]
    assert numbers(pa.array([Decimal("2.5")])).to_pylist() == [2.5]
    assert numbers(pa.array([True])).to_pylist() == [None]
    assert numbers(pa.array(["3", "x"])).to_pylist() == [None, None]
    assert numbers(pa.array(["3", "x", "nan"]), from_text=True).to_pylist() == [3, None, None]
    assert marks(pa.array([1, 0, 2, None])).to_pylist() == [True, False, None, None]
    assert marks(pa.array(["TRUE", "0", "0.0", "perhaps"]), from_text=True).to_pylist() == [
        True,
        False,
        False,
        None,
    ]
    assert marks(pa.array(["true"])).to_pylist() == [None]
    assert marks(pa.array([[1]])).to_pylist() == [None]
