"""Which language an instruction is written in."""

from collections.abc import Collection
from typing import TYPE_CHECKING

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
    for numbers, batch in selection.batches(fields=("instruction", "input")):
        pairs = zip(batch[0].to_pylist(), batch[1].to_pylist(), strict=True)
        spoken = [identifier.classify(f"{instruction} {given}")[0] for instruction, given in pairs]
        others += [n for n, code in zip(numbers.tolist(), spoken, strict=True) if code not in kept]
    selection.drop_numbers("other language", others)
