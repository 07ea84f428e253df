"""How near a model is to its teacher, token by token, which needs no reference but the teacher itself.

Two ways, each over held-out prompts. Forced: every model reads the teacher's answer and tells at each of its
tokens what it would have written. Free: the teacher reads what a model wrote and tells how likely it is.
"""

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
class _Text:
    """One text in tokens; the answer begins at `start`."""

    ids: list[int]
    start: int

    @property
    def inputs(self) -> list[int]:
        return self.ids[:-1]  # nothing is predicted after the last

    @property
    def answer(self) -> list[int]:
        return self.ids[self.start :]


def forced_agreement(
    teacher: Reading, others: Mapping[str, Reading], shared_vocabulary: int
) -> list[dict[str, dict[str, float]] | None]:
    """Return of each prompt how each model predicts the teacher's answer, beside how the teacher does.

    The answer's tokens are aligned from its end, since its first word can be cut into tokens otherwise after
    another prompt. Probabilities are over the first `shared_vocabulary` tokens; rows beyond them, with which
    output layers are padded, take no part.

    Returns:
        For each prompt and model `tokens`, `agreed` (places where both find the same token likeliest), `kl`
        (the sum of KL(teacher, model)) and `nats` (the answer's negative log-likelihood); the teacher among
        them. None where a text is too long for one of the models.
    """
    readings = {"teacher": teacher, **others}
    texts = {name: _texts(reading) for name, reading in readings.items()}
    found: list[dict[str, dict[str, float]] | None] = [None] * len(teacher.prompts)
    for places in _passes(readings, texts):
        logits = {
            name: list(_answer_logits(reading.model, [texts[name][p] for p in places]))
            for name, reading in readings.items()
        }
        for at, place in enumerate(places):
            ours = texts["teacher"][place].answer
            found[place] = {
                name: _compared(
                    logits["teacher"][at], rows[at], ours, texts[name][place].answer, shared_vocabulary
                )
                for name, rows in logits.items()
            }
    return found


def answer_nats(reading: Reading) -> list[dict[str, float] | None]:
    """Return of each answer its negative log-likelihood in nats and its tokens; None where it is too long."""
    texts = _texts(reading)
    found: list[dict[str, float] | None] = [None] * len(texts)
    for places in _passes({"": reading}, {"": texts}):
        rows = _answer_logits(reading.model, [texts[place] for place in places])
        for place, logits in zip(places, rows, strict=True):
            found[place] = {"tokens": len(texts[place].answer), "nats": _nats(logits, texts[place].answer)}
    return found


def _texts(reading: Reading) -> list[_Text]:
    tokenizer, texts = reading.tokenizer, []
    ended = [True] * len(reading.answers) if reading.ended is None else reading.ended
    for prompt, answer, ends in zip(reading.prompts, reading.answers, ended, strict=True):
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tail = tokenizer(answer, add_special_tokens=False)["input_ids"]
        texts.append(_Text([*head, *tail, *([tokenizer.eos_token_id] if ends else [])], len(head)))
    return texts


def _passes(readings: Mapping[str, Reading], texts: Mapping[str, list[_Text]]) -> Iterator[list[int]]:
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


def _fits(text: _Text, longest: int) -> bool:
    return bool(text.answer) and text.start > 0 and len(text.ids) <= longest


def _positions(model: Model) -> int:
    return getattr(model.config, "max_position_embeddings", None) or 2**31


def _answer_logits(model: Model, texts: Sequence[_Text]) -> Iterator[Any]:
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


def _compared(
    teacher: Any, model: Any, teacher_answer: list[int], answer: list[int], vocabulary: int
) -> dict[str, float]:
    import torch

    if teacher_answer[-1] != answer[-1]:  # another end of sequence, as of a base model: no other answer
        teacher, model, teacher_answer, answer = teacher[:-1], model[:-1], teacher_answer[:-1], answer[:-1]
    shared = _common_tail(teacher_answer, answer)
    ours, theirs = teacher[len(teacher) - shared :, :vocabulary], model[len(model) - shared :, :vocabulary]
    with torch.inference_mode():
        agreed = (ours.argmax(-1) == theirs.argmax(-1).to(ours.device)).sum().item()
        ours, theirs = ours.float().log_softmax(-1), theirs.float().log_softmax(-1).to(ours.device)
        kl = (ours.exp() * (ours - theirs)).sum().item()
        target = torch.tensor(answer[len(answer) - shared :], device=theirs.device)
        nats = -theirs.gather(-1, target[:, None]).sum().item()
    return {"tokens": shared, "agreed": agreed, "kl": round(kl, 4), "nats": round(nats, 4)}


def _nats(logits: Any, answer: list[int]) -> float:
    import torch
    from torch.nn.functional import cross_entropy

    target = torch.tensor(answer, device=logits.device)
    return round(cross_entropy(logits.float(), target, reduction="sum").item(), 4)


def _common_tail(first: list[int], second: list[int]) -> int:
    """Return how many tokens two answers share, counted from their ends."""
    shared = 0
    while shared < min(len(first), len(second)) and first[-1 - shared] == second[-1 - shared]:
        shared += 1
    return shared
