"""Words and runs of words, by which texts are compared, and instructions that are nearly the same."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from distill_app.core.texts import normalise

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
    for numbers, texts in selection.questions():
        shingles = [grams(words(text), SHINGLE_WORDS) for text in texts]
        some = [(str(n), found) for n, found in zip(numbers.tolist(), shingles, strict=True) if found]
        kept = seen.add_pairs(some)
        again += [int(n) for (n, _), is_new in zip(some, kept, strict=True) if not is_new]
    selection.reasons.drop("near duplicate", np.array(again, np.int64))
