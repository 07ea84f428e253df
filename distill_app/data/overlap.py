"""What held-out data shares with training data."""

from collections.abc import Iterable
from dataclasses import dataclass

from distill_app.core.files import Record
from distill_app.core.texts import normalise
from distill_app.data.frames import frame, masked
from distill_app.data.likeness import grams, words

RUN_WORDS = 13  # as GPT-3's appendix C takes it, arXiv:2005.14165


@dataclass(frozen=True)
class Overlap:
    """How many held-out records share something with training: the same text (`exact`), 13 words in a row or
    all of a shorter text (`ngram`), the same text but for names and numbers (`masked`); and of each record
    whether training knows its frame."""

    exact: int
    ngram: int
    masked: int
    known_frame: list[bool]


def overlap(train: Iterable[Record], heldout: Iterable[Record]) -> Overlap:
    """Return what the held-out records share with the training records.

    Training is read once, as a stream; memory grows with the held-out side alone.
    """
    asked = [_text(record) for record in heldout]
    exact, frames, masks = ([of(text) for text in asked] for of in (normalise, frame, masked))
    runs = [set(grams(words(text), RUN_WORDS)) for text in asked]
    wanted = [set(exact), set(frames), set(masks), set().union(*runs)]
    seen: list[set[str]] = [set(), set(), set(), set()]
    for record in train:
        text = _text(record)
        keys = ([normalise(text)], [frame(text)], [masked(text)], grams(words(text), RUN_WORDS))
        for found, only, those in zip(seen, wanted, keys, strict=True):
            found.update(only.intersection(those))
    return Overlap(
        exact=sum(key in seen[0] for key in exact),
        ngram=sum(not seen[3].isdisjoint(run) for run in runs),
        masked=sum(key in seen[2] or text in seen[0] for key, text in zip(masks, exact, strict=True)),
        known_frame=[key in seen[1] for key in frames],
    )


def _text(record: Record) -> str:
    return f"{record['instruction']} {record['input']}".strip()
