"""What `ask` and `chat` share: how answers are drawn, and showing them in a terminal."""

import argparse
import secrets
import unicodedata

from distill_app.core.models import Tokenizer
from distill_app.generation.answers import Sampling


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how an answer's tokens are chosen."""
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=256, help="an answer's limit (default 256)"
    )
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 (default) takes the likeliest token"
    )
    parser.add_argument("--seed", metavar="N", type=int, help="the same answers again at a temperature")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Return the sampling that the arguments describe; without a seed, one that nobody knows.

    Raises:
        ValueError: a number is out of range; one line.
    """
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: found {args.max_new_tokens}, expected 1 or more")
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature: found {args.temperature:g}, expected 0 or more")
    seed = secrets.randbits(32) if args.seed is None else args.seed
    return Sampling(args.max_new_tokens, args.temperature, seed=seed)


def check_chat_template(model: str, tokenizer: Tokenizer) -> None:
    """Raise ValueError for a model that does not say how it wants to be asked."""
    if not tokenizer.chat_template:
        raise ValueError(f"{model}: no chat template in it; ask a distilled or instruct model")


def utf8(question: str) -> str:
    """Return a question as it is; Python reads bytes that are not UTF-8 as lone surrogates.

    Raises:
        ValueError: it holds such; one line.
    """
    try:
        question.encode()
    except UnicodeEncodeError as err:
        raise ValueError(f"question: character {err.start} is not UTF-8; type or save it as UTF-8") from None
    return question


def visible(text: str) -> str:
    """Return text that can do nothing to a terminal: control characters become their pictures.

    Newlines and tabs stay. So escape sequences show as text, and so do marks that turn the direction of
    writing, by which a line could show as something that it does not say.
    """
    return "".join(char if _is_plain(char) else _picture(char) for char in text)


def _is_plain(char: str) -> bool:
    if char in "\n\t":
        return True
    turns = unicodedata.bidirectional(char) in {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return unicodedata.category(char) not in {"Cc", "Cs"} and not turns


def _picture(char: str) -> str:
    if char < " ":
        return chr(0x2400 + ord(char))
    return "\N{SYMBOL FOR DELETE}" if char == "\x7f" else "\N{REPLACEMENT CHARACTER}"
