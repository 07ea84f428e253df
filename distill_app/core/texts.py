"""What makes two texts one: for the held-out split, for training's validation, for overlap."""

import unicodedata


class Folds(dict[int, str]):
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


FOLDS = Folds()


def normalise(text: str) -> str:
    """Return the text as it is compared: NFKC, casefold, punctuation and white space as one space.

    Digits, letters of any script, their marks, and symbols such as + and = are kept.
    """
    if text.isascii():  # nothing to compose, and five times as fast
        return " ".join(text.lower().translate(FOLDS).split())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.translate(FOLDS).split())
