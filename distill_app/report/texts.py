"""Texts of models made fit to be read: nothing hidden in them, and the words that differ found."""

import re
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any

MARKED_ABOVE = 0.3  # share of words in common
COMPARED_WORDS = 500  # longer texts are not compared: where both go in circles, difflib takes cubic time
# Chinese and Japanese are written without spaces, so a character counts as a word there.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]\s*|[^\W\u3040-\u30ff\u3400-\u9fff]+\s*|[^\w\s]\s*|\s+")
# Embeddings, overrides and isolates: after one of them a text reads in another order than it is written.
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")


def clean(value: Any) -> Any:
    """Return the value with every text in it made safe to show, at any depth.

    Control characters become their visible pictures (U+2400 block), for a NUL would be dropped by a browser
    and an escape heeded by a terminal; controls of the reading order become ⟨U+202E⟩; lone surrogates,
    which no file can hold, U+FFFD. Line breaks and tabs stay.
    """
    if isinstance(value, str):
        text = re.sub("\r\n?", "\n", value)
        text = re.sub("[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), text)
        text = _BIDI.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
        return re.sub("[\x7f-\x9f\ud800-\udfff]", "\ufffd", text)
    if isinstance(value, Mapping):
        return {clean(key): clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, list | tuple) else value


def differing(text: str, other: str) -> tuple[list[tuple[str, bool]], float | None]:
    """Return the text in pieces, each with whether its words are not in the other text in that place.

    Where little is shared, marks would be noise: the text comes in one piece.

    Returns:
        The pieces, and the share of words in common (difflib's ratio); None where it was not looked for.
    """
    words, others = _WORD.findall(text), _WORD.findall(other)
    if max(len(words), len(others)) > COMPARED_WORDS:
        return [(text, False)], None
    matcher = SequenceMatcher(None, [word.strip() for word in words], [w.strip() for w in others], False)
    if matcher.ratio() < MARKED_ABOVE:
        return [(text, False)], matcher.ratio()
    return list(_pieces(matcher, words)), matcher.ratio()


def _pieces(matcher: SequenceMatcher[str], words: list[str]) -> Iterator[tuple[str, bool]]:
    for tag, start, end, _, _ in matcher.get_opcodes():
        piece = "".join(words[start:end])
        # The space after the last marked word is not marked: at a line's end it would hang over.
        differs = piece.rstrip() if tag != "equal" else ""
        if differs:
            yield differs, True
        if rest := piece[len(differs) :]:
            yield rest, False
