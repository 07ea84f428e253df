"""What makes two texts one for the held-out split."""

import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from distill_app.core.files import Record

if TYPE_CHECKING:
    import pyarrow as pa


class _Folds(dict[int, str]):
    """For `str.translate`: punctuation and white space turn into a space, format marks go."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        if category == "Cf":  # zero-width and direction marks
            fold = ""
        elif category[0] in "PZ" or category == "Cc":
            fold = " "
        else:
            fold = char
        self[code] = fold
        return fold


_FOLDS = _Folds()
_ASCII_FOLDS = np.array(
    [0, *(ord(_FOLDS[code]) for code in map(ord, map(str.lower, map(chr, range(1, 128)))))]
)
_ASCII_FOLDS = _ASCII_FOLDS.astype(np.uint8)
BLANK = ord(" ")


def normalise(text: str) -> str:
    """Return the text as it is compared: NFKC, casefold, punctuation and white space as one space.

    Digits, letters of any script, their marks, and symbols such as + and = are kept.
    """
    if text.isascii():  # nothing to compose, and five times as fast
        return " ".join(text.lower().translate(_FOLDS).split())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.translate(_FOLDS).split())


def normalise_all(texts: "pa.Array") -> "pa.Array":
    """Return each text as `normalise` does, hundreds of times as fast where all are ASCII without NUL.

    Args:
        texts: an Arrow array of texts, none of them null.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    end, nothing = (pa.scalar(mark, pa.large_string()) for mark in ("\0", ""))
    ended = pc.binary_join_element_wise(texts.cast(pa.large_string()), end, nothing)
    starts = np.frombuffer(ended.buffers()[1], np.int64)[ended.offset :]
    letters = np.frombuffer(ended.buffers()[2], np.uint8)[starts[0] : starts[len(ended)]]
    if len(letters) == 0 or letters.max() > 127 or np.count_nonzero(letters == 0) > len(texts):
        return pa.array([normalise(text) for text in texts.to_pylist()], pa.large_string())
    letters = _ASCII_FOLDS[letters]
    gap = letters <= BLANK  # a blank, or a text's end
    letters = letters[~(gap & (letters == BLANK) & np.concatenate([[True], gap[:-1]]))]
    letters = letters[~((letters == BLANK) & np.append(letters[1:] == 0, False))]
    ends = np.flatnonzero(letters == 0)
    kept = letters[letters != 0]
    offsets = np.concatenate([[0], ends - np.arange(len(ends))])
    return pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(kept))


def overlap(train: Iterable[Record], heldout: Iterable[Record]) -> int:
    """Count the held-out records whose normalised text is in train."""
    trained = {_key(record) for record in train}
    return sum(_key(record) in trained for record in heldout)


def _key(record: Record) -> str:
    return normalise(f"{record['instruction']} {record['input']}")
