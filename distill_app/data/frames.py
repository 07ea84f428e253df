"""What two problems share when one is the other with other names, numbers and things: their frame."""

import re

from distill_app.core.texts import normalise
from distill_app.data.likeness import words

MARK = "_"
ENGLISH = 0.25  # share of function words from which a text is read as English; a story has nearly half
NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
# The closed classes of English: what is left of a sentence when names, numbers and things are taken out.
# Words that say a number, such as half, twice and three times, are numbers.
_CLOSED_CLASSES = """
a the this that these those each every all both any some no none another other others same i you we they me
us them my your its our their mine it who whom whose which what when where why how and or but nor so if then
than as while until after before because though although since unless of in on at by for from to into onto
with without about over under between among through during per up down out off away back again is are was
were be been being am do does did done have has had having will would shall should can could may might must
not here there now later first next last finally also too only just even still already more less fewer most
least many much few several enough together altogether total left remain remains remaining
"""
# A name that is exchanged takes its pronouns with it, a noun its article.
_FOLDED = {"he": "he", "she": "he", "him": "his", "his": "his", "her": "his", "hers": "his", "an": "a"}
FUNCTION_WORDS = {word: word for word in _CLOSED_CLASSES.split()} | _FOLDED


def frame(text: str) -> str:
    """Return a problem's frame: its function words in order, all others masked.

    Names, numbers and content words become one mark, and a run of marks one, so that problems told with other
    names, numbers and things have one frame. In a text that is not English prose (another language, formulas,
    a request of a few words) that would leave nothing to tell two problems apart, so there the numbers alone
    are masked. Spellings that `normalise` takes for one text have one frame.
    """
    found = words(text)
    prose = [word for word in found if not word[0].isdigit()]
    is_english = sum(word in FUNCTION_WORDS for word in prose) >= ENGLISH * max(len(prose), 1)
    kept: list[str] = []
    for word in found:
        is_masked = word not in FUNCTION_WORDS if is_english else word[0].isdigit()
        if not is_masked:
            kept.append(FUNCTION_WORDS.get(word, word) if is_english else word)
        elif kept[-1:] != [MARK]:
            kept.append(MARK)
    return " ".join(kept)


def masked(text: str) -> str:
    """Return a text as it is compared, without its names and numbers.

    A name is a word with a capital, the rest small, that is no function word; its pronouns go with it.
    """
    return normalise(re.sub(r"[^\W\d_]+", _without_name, NUMBER.sub("0", text)))


def _without_name(word: re.Match[str]) -> str:
    known = FUNCTION_WORDS.get(word[0].casefold())
    return known or ("x" if word[0].istitle() else word[0])
