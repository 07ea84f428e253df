"""What is to be trained on and stands in a benchmark or on the held-out side as well."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_app.data.frames import masked
from distill_app.data.heldout import HELDOUT, TRAIN
from distill_app.data.likeness import grams, words
from distill_app.data.sources import Dataset, load_rows

if TYPE_CHECKING:
    from distill_app.data.selection import Selection


def drop_overlaps(
    selection: "Selection", run_words: int | None, is_masked: bool, files: Sequence[str]
) -> None:
    """Drop what is to be trained on and overlaps with a held-out text or a text of these files.

    Questions are compared, not their answers. Memory grows by 8 bytes for each word of the guarded texts.

    Args:
        run_words: so many words in a row that both have are an overlap; None: off.
        is_masked: so is the same text but for its names and numbers.

    Source: n-gram overlap as in GPT-3's appendix C, arXiv:2005.14165, which takes 13 words.
    """
    heldout = (text for _, texts in selection.questions(selection.taken(HELDOUT)) for text in texts)
    sources: dict[str, Iterable[str]] = {"held-out": heldout}
    sources |= {Path(file).name: _texts_of(file) for file in files}
    for name, guarded in sources.items():
        texts = list(guarded) if run_words is not None and is_masked else guarded
        if run_words is not None:
            _drop(selection, f"overlap with {name}", texts, partial(_runs, count=run_words))
        if is_masked:
            _drop(selection, f"masked overlap with {name}", texts, lambda text: [masked(text)])


def _runs(text: str, count: int) -> list[str]:
    return grams(words(text), count)


def _drop(selection: "Selection", reason: str, guarded: Iterable[str], keys_of: Any) -> None:
    """Drop what has a key that a guarded text has."""
    known = np.unique(np.fromiter(_hashes(guarded, keys_of), np.uint64))
    found: list[int] = []
    for numbers, texts in selection.questions(selection.taken(TRAIN)):
        for n, text in zip(numbers.tolist(), texts, strict=True):
            if has_any(known, np.fromiter(_hashes([text], keys_of), np.uint64)):
                found.append(n)
    selection.reasons.drop(reason, np.array(found, np.int64))


def has_any(ordered: "np.ndarray[Any, Any]", wanted: "np.ndarray[Any, Any]") -> bool:
    """Return whether sorted numbers have one of those wanted; np.isin would sort them again."""
    if len(ordered) == 0:
        return False
    places = np.searchsorted(ordered, wanted).clip(max=len(ordered) - 1)
    return bool((ordered[places] == wanted).any())


def _hashes(texts: Iterable[str], keys_of: Any) -> Iterator[int]:
    from rensa import RMinHash

    for text in texts:
        for hashes in RMinHash.hash_token_sets([keys_of(text)]):
            yield from hashes


def _texts_of(file: str) -> Iterator[str]:
    for row in load_rows(Dataset(file)):
        yield from _texts_within(row)


def _texts_within(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts_within(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts_within(item)
