"""How likely a model finds given answers, read token by token in one pass (teacher forcing)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_app.core.models import Model, Tokenizer

PASS_TOKENS = 2048  # of one forward pass, padding included; a longer text has a pass of its own


@dataclass(frozen=True)
class Reading:
    """Texts as one model reads them: prompts, and after each the answer as that model would write it."""

    model: Model
    tokenizer: Tokenizer
    prompts: Sequence[str]
    answers: Sequence[str]
    ended: Sequence[bool] | None = None  # whether end of sequence follows each answer; None: it always does


@dataclass(frozen=True)
class ReadText:
    """One text in tokens; the answer begins at `start`."""

    ids: list[int]
    start: int

    @property
    def inputs(self) -> list[int]:
        """What the model reads."""
        return self.ids[:-1]  # nothing is predicted after the last

    @property
    def answer(self) -> list[int]:
        """What is scored."""
        return self.ids[self.start :]


def answer_nats(reading: Reading) -> list[dict[str, float] | None]:
    """Return of each answer its negative log-likelihood in nats and its tokens; None where it is too long."""
    texts = read_texts(reading)
    found: list[dict[str, float] | None] = [None] * len(texts)
    for places in passes({"": reading}, {"": texts}):
        rows = answer_logits(reading.model, [texts[place] for place in places])
        for place, logits in zip(places, rows, strict=True):
            found[place] = {"tokens": len(texts[place].answer), "nats": _nats(logits, texts[place].answer)}
    return found


def read_texts(reading: Reading) -> list[ReadText]:
    """Return each prompt and its answer in tokens."""
    tokenizer, texts = reading.tokenizer, []
    ended = [True] * len(reading.answers) if reading.ended is None else reading.ended
    for prompt, answer, ends in zip(reading.prompts, reading.answers, ended, strict=True):
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tail = tokenizer(answer, add_special_tokens=False)["input_ids"]
        texts.append(ReadText([*head, *tail, *([tokenizer.eos_token_id] if ends else [])], len(head)))
    return texts


def passes(readings: Mapping[str, Reading], texts: Mapping[str, list[ReadText]]) -> Iterator[list[int]]:
    """Yield the places of the texts of each pass, longest first; of those that all models can read."""
    longest = {name: _positions(reading.model) for name, reading in readings.items()}

    def width(place: int) -> int:
        return max(len(of[place].ids) for of in texts.values())

    places = [
        place
        for place in range(len(next(iter(texts.values()))))
        if all(_fits(of[place], longest[name]) for name, of in texts.items())
    ]
    places.sort(key=width, reverse=True)
    while places:
        count = max(1, PASS_TOKENS // width(places[0]))
        yield places[:count]
        places = places[count:]


def _fits(text: ReadText, longest: int) -> bool:
    return bool(text.answer) and text.start > 0 and len(text.ids) <= longest


def _positions(model: Model) -> int:
    return getattr(model.config, "max_position_embeddings", None) or 2**31


def answer_logits(model: Model, texts: Sequence[ReadText]) -> Iterator[Any]:
    """Yield of each text the logits at its answer's tokens, `(tokens, vocab)`, from one forward pass."""
    import torch

    width = max(len(text.inputs) for text in texts)
    # No mask: padding stands right of all that is read, where causal attention does not look
    padded = [text.inputs + [0] * (width - len(text.inputs)) for text in texts]
    kept = width - min(text.start for text in texts) + 1
    with torch.inference_mode():
        batch = torch.tensor(padded, device=model.device)
        logits = model(input_ids=batch, use_cache=False, logits_to_keep=kept).logits
    for row, text in zip(logits, texts, strict=True):
        # The token at a place is predicted one place before it
        begin = text.start - 1 - (width - kept)
        yield row[begin : begin + len(text.answer)]


def _nats(logits: Any, answer: list[int]) -> float:
    import torch
    from torch.nn.functional import cross_entropy

    target = torch.tensor(answer, device=logits.device)
    return round(cross_entropy(logits.float(), target, reduction="sum").item(), 4)
