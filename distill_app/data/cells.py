"""What a cell holds, whatever its file made of it.

Scalar functions say it of one value, as JSON and CSV give it; array functions of an Arrow column.
"""

from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

    Flags = np.ndarray[Any, np.dtype[np.bool_]]

NOT_TEXT = "\0not text"  # stands where a text was expected and something else was; no text may hold a NUL
MARKS = {"true": True, "t": True, "yes": True, "y": True, "false": False, "f": False, "no": False, "n": False}
BLANK = ord(" ")
BLANKS_AT_ONCE = 4  # at a text's beginning; where there are more, Python looks at it


def text(value: Any) -> str | None:
    """Return a text as it is, null as null, and NOT_TEXT for anything else."""
    return value if value is None or isinstance(value, str) else NOT_TEXT


def number(value: Any, from_text: bool = False) -> float | None:
    """Return a value's number; None where it is none.

    Args:
        from_text: a text that reads as a number is one, as in CSV.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | (str if from_text else int)):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return None if found != found else found


def mark(value: Any, from_text: bool = False) -> bool | None:
    """Return whether a value says true (or 1) or false (or 0); None where it says neither."""
    if isinstance(value, bool):
        return value
    if from_text and isinstance(value, str) and value.lower() in MARKS:
        return MARKS[value.lower()]
    found = number(value, from_text)
    return {1.0: True, 0.0: False}.get(found) if found is not None else None


def texts(column: "pa.Array") -> "pa.Array":
    """Return a column of any type as `text` has each of its values, as large_string.

    Raises:
        pa.ArrowInvalid: a text is not UTF-8.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not is_text(column.type):
        other = pa.scalar(NOT_TEXT, pa.large_string())
        return pc.if_else(column.is_valid(), other, pa.scalar(None, pa.large_string()))
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    found = column.cast(pa.large_string())
    found.validate(full=True)
    return found


def numbers(column: "pa.Array", from_text: bool = False) -> "pa.Array":
    """Return a column of any type as `number` has each of its values."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as pt

    kind = column.type
    if pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind):
        found = column.cast(pa.float64(), safe=False)
        return pc.if_else(pc.is_nan(found), pa.scalar(None, pa.float64()), found)
    return _each(column, lambda value: number(value, from_text), pa.float64())


def marks(column: "pa.Array", from_text: bool = False) -> "pa.Array":
    """Return a column of any type as `mark` has each of its values."""
    import pyarrow as pa

    if pa.types.is_boolean(column.type):
        return column
    return _each(column, lambda value: mark(value, from_text), pa.bool_())


def _each(column: "pa.Array", value_of: Callable[[Any], Any], kind: "pa.DataType") -> "pa.Array":
    import pyarrow as pa

    if pa.types.is_nested(column.type):
        return pa.nulls(len(column), kind)
    return pa.array(map(value_of, column.to_pylist()), kind)


def is_text(kind: "pa.DataType") -> bool:
    """Return whether a column holds texts, however they lie in memory."""
    import pyarrow.types as pt

    return (
        pt.is_string(kind)
        or pt.is_large_string(kind)
        or pt.is_string_view(kind)
        or (pt.is_dictionary(kind) and is_text(kind.value_type))
    )


def filled(column: "pa.Array") -> "pa.Array":
    """Return texts with empty ones for null."""
    import pyarrow.compute as pc

    return pc.fill_null(column, "") if column.null_count else column


def letters_of(column: "pa.Array") -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
    """Return the UTF-8 bytes of texts (large_string, without nulls) in one piece, and where each begins."""
    offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
    if len(offsets) == 0 or offsets[0] == offsets[-1]:
        return np.zeros(0, np.uint8), np.zeros(len(column) + 1, np.int64)
    letters = np.frombuffer(column.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    return letters, offsets - offsets[0]


def is_blank(column: "pa.Array") -> "Flags":
    """Return of each text whether it is null, empty or white space."""
    found = filled(column)
    letters, offsets = letters_of(found)
    blank = np.diff(offsets) == 0
    unsure = np.flatnonzero(~blank)  # so far there were blanks alone
    places = offsets[unsure]
    for _ in range(BLANKS_AT_ONCE):
        letter = letters[places]
        open_ = (letter <= BLANK) | (letter > 126)
        unsure, places, letter = unsure[open_], places[open_], letter[open_]
        more = (letter == BLANK) & (places + 1 < offsets[unsure + 1])
        if not more.any():
            break
        places = places + more
    for at in unsure:
        blank[at] = not found[int(at)].as_py().strip()
    return blank


def has_nul(column: "pa.Array") -> "Flags":
    """Return of each text whether it has a NUL, which no file may hold."""
    found = filled(column)
    letters, offsets = letters_of(found)
    has = np.zeros(len(found), np.bool_)
    has[np.searchsorted(offsets, np.flatnonzero(letters == 0), side="right") - 1] = True
    return has


def is_not_text(column: "pa.Array") -> "Flags":
    """Return of each text whether something else stood there."""
    import pyarrow.compute as pc

    found = pc.fill_null(pc.equal(column, NOT_TEXT), False)
    return found.to_numpy(zero_copy_only=False)


def collapsed(column: "pa.Array") -> "pa.Array":
    """Return texts with single blanks for white space and none at their ends."""
    import pyarrow as pa

    letters, offsets = letters_of(column)
    if len(letters) == 0:
        return column
    is_space = letters <= BLANK
    odd = (letters < BLANK) | (letters > 126)
    odd[1:] |= is_space[1:] & is_space[:-1]
    starts = offsets[:-1][np.diff(offsets) > 0]
    odd[starts] |= is_space[starts]
    ends = offsets[1:][np.diff(offsets) > 0] - 1
    odd[ends] |= is_space[ends]
    changed = np.unique(np.searchsorted(offsets, np.flatnonzero(odd), side="right") - 1)
    if len(changed) == 0:
        return column
    every = column.to_numpy(zero_copy_only=False)
    for at in changed:
        every[at] = " ".join(every[at].split())
    return pa.array(every, pa.large_string())


def identities(column: "pa.Array") -> "np.ndarray[Any, Any]":
    """Return a number for each text, the same for the same text within this process (64 bits of SipHash)."""
    import pyarrow as pa

    as_bytes = column.cast(pa.large_binary()).to_numpy(zero_copy_only=False)
    return np.fromiter(map(hash, as_bytes), np.int64, len(column))
