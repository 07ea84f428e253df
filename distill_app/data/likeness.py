"""Instructions that are nearly the same, and instructions that a benchmark or the held-out side has."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_app.data.heldout import normalise
from distill_app.data.sources import load_rows

if TYPE_CHECKING:
    from distill_app.data.selection import Selection

SHINGLE_WORDS = 3
PERMUTATIONS = 128  # of a MinHash: one standard deviation of its estimate is 0.04 at most
BANDS = 32  # of 4: finds all but 1 in 200,000 of pairs with a similarity of 0.75, and of 0.5 seven in eight
# Chinese, Japanese, Thai and Lao write no blanks between words: each letter is a word
UNSPACED = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")


def words(text: str) -> list[str]:
    """Return the words and symbols of a text as it is compared."""
    return WORD.findall(normalise(text))


def grams(found: Sequence[str], count: int) -> list[str]:
    """Return all runs of `count` words; a shorter text is one run."""
    if len(found) <= count:
        return [" ".join(found)] if found else []
    return [" ".join(found[at : at + count]) for at in range(len(found) - count + 1)]


def drop_near_duplicates(selection: "Selection", threshold: float, seed: int) -> None:
    """Drop each instruction of which an earlier one, itself kept, has a like share of word triples.

    Memory grows by about 1 KB an instruction that is kept.

    Source: MinHash, Broder 1997, with locality-sensitive hashing; rensa's R-MinHash.
    """
    from rensa import RMinHashDeduplicator

    seen = RMinHashDeduplicator(threshold, PERMUTATIONS, use_lsh=True, num_bands=BANDS, seed=seed)
    again: list[int] = []
    for numbers, texts in _texts(selection, "SELECT n FROM taken"):
        shingles = [grams(words(text), SHINGLE_WORDS) for text in texts]
        some = [(str(n), found) for n, found in zip(numbers.tolist(), shingles, strict=True) if found]
        kept = seen.add_pairs(some)
        again += [int(n) for (n, _), is_new in zip(some, kept, strict=True) if not is_new]
    selection.drop_numbers("near duplicate", again)


def drop_benchmark_texts(selection: "Selection", count: int, files: Sequence[str]) -> None:
    """Drop what is to be trained on and shares `count` words in a row with held-out or benchmark texts.

    Memory grows by 8 bytes for each word of those texts.

    Source: n-gram overlap as in GPT-3's appendix C, arXiv:2005.14165, which takes 13.
    """
    heldout = (text for _, texts in _texts(selection, "SELECT n FROM taken WHERE side = 2") for text in texts)
    sources: dict[str, Iterable[str]] = {"overlap with held-out": heldout}
    sources |= {f"overlap with {Path(file).name}": _benchmark_texts(file) for file in files}
    for reason, texts in sources.items():
        guarded = np.unique(np.fromiter(_hashes(texts, count), np.uint64))
        found: list[int] = []
        for numbers, batch in _texts(selection, "SELECT n FROM taken WHERE side = 1"):
            for n, text in zip(numbers.tolist(), batch, strict=True):
                if has_any(guarded, np.fromiter(_hashes([text], count), np.uint64)):
                    found.append(n)
        selection.drop_numbers(reason, found)


def has_any(ordered: "np.ndarray[Any, Any]", wanted: "np.ndarray[Any, Any]") -> bool:
    """Return whether sorted numbers have one of those wanted; np.isin would sort them again."""
    if len(ordered) == 0:
        return False
    places = np.searchsorted(ordered, wanted).clip(max=len(ordered) - 1)
    return bool((ordered[places] == wanted).any())


def _hashes(texts: Iterable[str], count: int) -> Iterator[int]:
    from rensa import RMinHash

    for text in texts:
        for hashes in RMinHash.hash_token_sets([grams(words(text), count)]):
            yield from hashes


def _benchmark_texts(file: str) -> Iterator[str]:
    for row in load_rows(file, "train"):
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


def _texts(selection: "Selection", numbers: str) -> Iterator[tuple["np.ndarray[Any, Any]", list[str]]]:
    for found, batch in selection.batches(numbers, ("instruction", "input")):
        pairs = zip(batch[0].to_pylist(), batch[1].to_pylist(), strict=True)
        yield found, [f"{instruction} {given}" for instruction, given in pairs]
