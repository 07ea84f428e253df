"""Which language an instruction is written in."""

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from distill_app.data.selection import Selection


def drop_other_languages(selection: "Selection", kept: Collection[str]) -> None:
    """Drop instructions in other languages than these ISO 639-1 codes, as langid's model tells them.

    Raises:
        ValueError: a code that it does not know.
    """
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    unknown = sorted(set(kept) - set(identifier.labels))
    if unknown:
        known = ", ".join(sorted(identifier.labels))
        raise ValueError(f"languages: found {unknown[0]}, expected some of {known}")
    others: list[int] = []
    for numbers, texts in selection.questions():
        spoken = [identifier.classify(text)[0] for text in texts]
        others += [n for n, code in zip(numbers.tolist(), spoken, strict=True) if code not in kept]
    selection.reasons.drop("other language", np.array(others, np.int64))
