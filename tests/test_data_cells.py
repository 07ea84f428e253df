"""White space in SQL is white space in Python."""

import sys
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distill_app.data.cells import collapsed, is_blank
from distill_app.data.engine import Database, open_database

SPACES = [chr(code) for code in range(1, sys.maxunicode + 1) if chr(code).isspace()]


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    with open_database() as database:
        yield database


def test_every_white_space_of_python_and_no_other_letter_is_blank(
    database: Database,
) -> None:
    every = f"SELECT chr(code::INTEGER) AS x, code FROM range(1, {sys.maxunicode + 1}) r(code)"
    real = f"SELECT * FROM ({every} WHERE code NOT BETWEEN 55296 AND 57343)"  # halves of letters
    found = database.rows(f"SELECT x FROM ({real}) WHERE {is_blank('x')} ORDER BY code")
    assert [letter for (letter,) in found] == SPACES


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b", " ", " ", "\n", "  ", "\u200b"] + SPACES)).map("".join))
@example("\n")
@example(" a \n b\n")
def test_a_collapsed_text_has_its_words_with_single_blanks(database: Database, text: str) -> None:
    found = database.one(f"SELECT {collapsed('x')} FROM (SELECT $1 AS x)", [text])
    assert found == " ".join(text.split())
