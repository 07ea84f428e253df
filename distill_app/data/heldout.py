"""The held-out split: a side for each text, whatever else the slice holds."""

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence

from distill_app.core.files import Record


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


def normalise(text: str) -> str:
    """Return the text as it is compared: NFKC, casefold, punctuation and white space as one space.

    Digits, letters of any script, their marks, and symbols such as + and = are kept.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.translate(_FOLDS).split())


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
