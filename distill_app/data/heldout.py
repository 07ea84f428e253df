"""The held-out split: a side for each text, whatever else the slice holds."""

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
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


def split_heldout(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Return (train, heldout), both in the order of `records`.

    A record's side depends on its normalised instruction and input and on the seed alone: it stays
    when the slice grows, and all records of one text are on one side. Where that leaves a side
    empty although `fraction` > 0 and there are two texts, the text nearest to the threshold changes
    side; it may change back when the slice grows.

    Raises:
        ValueError: the fraction is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"heldout_fraction: found {fraction}, expected 0 or more and less than 1")
    keys = [_key(record) for record in records]
    places = {key: _place(key, seed) for key in keys}
    held = {key for key, place in places.items() if place < fraction}
    if fraction > 0 and len(places) > 1:
        order = sorted(places, key=lambda key: (places[key], key))
        held = (held or {order[0]}) - ({order[-1]} if len(held) == len(order) else set())
    train = [record for key, record in zip(keys, records, strict=True) if key not in held]
    heldout = [record for key, record in zip(keys, records, strict=True) if key in held]
    return train, heldout


def first_of_each_text(records: Iterable[Record]) -> list[Record]:
    """Return the first record of each normalised instruction and input."""
    firsts: dict[str, Record] = {}
    for record in records:
        firsts.setdefault(_key(record), record)
    return list(firsts.values())


def overlap(train: Iterable[Record], heldout: Iterable[Record]) -> int:
    """Count the held-out records whose normalised text is in train."""
    trained = {_key(record) for record in train}
    return sum(_key(record) in trained for record in heldout)


def _key(record: Record) -> str:
    return normalise(f"{record['instruction']} {record['input']}")


def _place(key: str, seed: int) -> float:
    """Return a place in [0, 1), evenly spread over texts."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # 48 bits are exact in a float
