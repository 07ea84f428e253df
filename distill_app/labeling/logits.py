"""How likely the teacher finds its own answers, token by token: its likeliest tokens and what is beyond.

The answers are fixed, so one forward pass scores all tokens of many answers (teacher forcing).
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_app.core.files import Record, iter_records
from distill_app.core.logits import TAIL_FLOOR, TopRow, new_top_logits, tokenizer_digest
from distill_app.core.models import Model, Tokenizer, load_teacher, load_tokenizer
from distill_app.core.prompts import teacher_prompt
from distill_app.labeling.engines import resolve_weights
from distill_app.labeling.memory import release_memory
from distill_app.labeling.params import LabelParams
from distill_app.labeling.progress import REPORT_EVERY_SEC, tell

PASS_TOKENS = 2048  # of one forward pass, padding included; a longer answer has a pass of its own
WINDOW_TOKENS = 16 * PASS_TOKENS  # read ahead, to run answers of like length side by side
HEAD_CELLS = 2**25  # scores over the vocabulary held at a time, 128 MiB in float32
PROBE_TOKENS = 8


@dataclass(frozen=True)
class _Row:
    """The tokens of a prompt and its answer; the answer begins at `start` and ends with end of sequence."""

    ids: list[int]
    start: int

    @property
    def inputs(self) -> list[int]:
        return self.ids[:-1]  # nothing is predicted after the last


def check_top_logits(params: LabelParams) -> None:
    """Make sure that the params can give what `label.top_logits` asks for; no model is loaded.

    Raises:
        FileNotFoundError, OSError: the teacher's tokenizer is not to be had.
        ValueError: the engine has no weights here, or the vocabulary is too small.
    """
    if not params.top_logits:
        return
    if params.engine == "openai":
        raise ValueError(
            f"label.top_logits: found {params.top_logits} with label.engine: openai, expected 0, for a server"
            " keeps its weights; take engine transformers or vllm"
        )
    tokenizer = load_tokenizer(params.teacher, params.revision)
    if params.top_logits > len(tokenizer):
        raise ValueError(
            f"label.top_logits: found {params.top_logits}, expected at most the {len(tokenizer)} tokens of"
            f" {params.teacher}; lower it"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{params.teacher}: the tokenizer has no eos_token, which ends every scored answer;"
            " give it one, or set label.top_logits: 0"
        )


def write_top_logits(params: LabelParams, labeled_path: str, logits_path: str, log_path: str) -> None:
    """Write the teacher's likeliest tokens for each answer of a labelled file, in the file's order.

    With `label.top_logits: 0` no model is loaded and the file has no row. Memory does not grow with the
    number of answers.

    Args:
        log_path: gets progress and speed.

    Raises:
        FileNotFoundError, OSError, ValueError: from the files, the params or the teacher; one line.
    """
    if not params.top_logits:
        with new_top_logits(logits_path, 0, 0, "", params.teacher):
            return
    check_top_logits(params)
    release_memory()  # what the engine that wrote the answers has left
    _, revision = resolve_weights(params.teacher, params.revision)
    model, tokenizer = load_teacher(params.teacher, params.quantization, revision)
    _check_scores(model, tokenizer)
    told = _Told(_check_answers(model, tokenizer, labeled_path), log_path)
    rows = score_answers(model, tokenizer, iter_records(labeled_path), params.top_logits, told.add)
    digest = tokenizer_digest(tokenizer)
    with new_top_logits(logits_path, params.top_logits, len(tokenizer), digest, params.teacher) as add:
        for number, row in enumerate(rows):
            if not np.isfinite(row.tail).all():
                raise ValueError(
                    f"{labeled_path}: record {number}: {params.teacher} gives scores that are not finite;"
                    " mend its weights, or set label.top_logits: 0"
                )
            add(row.tokens, row.ids, row.logprobs, row.tail)


def score_answers(
    model: Model,
    tokenizer: Tokenizer,
    records: Iterable[Record],
    top: int,
    report: Callable[[list[TopRow]], None] = lambda rows: None,
) -> Iterator[TopRow]:
    """Yield what the model finds likeliest at each token of each record's output, in the records' order.

    The answer's tokens are those of `output` alone, then end of sequence. Probabilities are over the
    tokenizer's tokens: output rows beyond them, with which models are padded, take no part.

    Args:
        report: called after each pass with what it scored, in any order.
    """
    rows = (_tokenized(tokenizer, record) for record in records)
    for window in _windows(rows):
        scored: dict[int, TopRow] = {}
        for places in _passes(window):
            found = _score(model, [window[place] for place in places], top, len(tokenizer))
            report(found)
            scored.update(zip(places, found, strict=True))
        yield from (scored[place] for place in range(len(window)))


def _tokenized(tokenizer: Tokenizer, record: Record) -> _Row:
    text = teacher_prompt(tokenizer, record["instruction"], record["input"], "system1")
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = tokenizer(record["output"], add_special_tokens=False)["input_ids"]
    return _Row([*prompt, *answer, tokenizer.eos_token_id], len(prompt))


def _windows(rows: Iterable[_Row]) -> Iterator[list[_Row]]:
    window: list[_Row] = []
    tokens = 0
    for row in rows:
        window.append(row)
        tokens += len(row.ids)
        if tokens >= WINDOW_TOKENS:
            yield window
            window, tokens = [], 0
    if window:
        yield window


def _passes(window: list[_Row]) -> Iterator[list[int]]:
    """Yield the places of the rows of each pass, longest first."""
    places = sorted(range(len(window)), key=lambda place: -len(window[place].inputs))
    while places:
        count = max(1, PASS_TOKENS // len(window[places[0]].inputs))
        yield places[:count]
        places = places[count:]


def _score(model: Model, rows: list[_Row], top: int, vocab_size: int) -> list[TopRow]:
    """Return each row's answer, scored in one pass; only the answers go through the output layer."""
    import torch

    width = max(len(row.inputs) for row in rows)
    # No mask: padding stands right of all that is read, where causal attention does not look
    padded = [row.inputs + [0] * (width - len(row.inputs)) for row in rows]
    with torch.inference_mode():
        states = _states(model, padded)
        # The token at a place is predicted one place before it
        states = torch.cat([states[i, row.start - 1 : len(row.inputs)] for i, row in enumerate(rows)])
        head = model.get_output_embeddings()
        parts = [_likeliest(head(s), top, vocab_size) for s in states.split(max(1, HEAD_CELLS // vocab_size))]
        ids, logprobs, tail = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    scored, begin = [], 0
    for row in rows:
        tokens = np.array(row.ids[row.start :], np.int32)
        end = begin + len(tokens)
        scored.append(TopRow(tokens, ids[begin:end], logprobs[begin:end], tail[begin:end]))
        begin = end
    return scored


def _states(model: Model, ids: list[list[int]]) -> Any:
    """Return what goes into the output layer, `(batch, tokens, hidden)`."""
    import torch

    batch = torch.tensor(ids, device=model.device)
    return model.get_decoder()(input_ids=batch, use_cache=False).last_hidden_state


def _likeliest(logits: Any, top: int, vocab_size: int) -> tuple[Any, Any, Any]:
    """Return ids `(rows, top)` int32, logprobs `(rows, top)` and tail `(rows,)` float16.

    Args:
        logits: `(rows, vocab or more)`; they are overwritten.
    """
    import torch

    scores = logits[:, :vocab_size].float()
    total = scores.logsumexp(-1, keepdim=True)
    best, ids = scores.topk(top, dim=-1)
    # A sum of its own: 1 minus the others would leave nothing of a small rest
    rest = scores.scatter_(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    tail = (rest - total).clamp(min=TAIL_FLOOR).squeeze(-1)
    logprobs = (best - total).clamp(min=torch.finfo(torch.float16).min)
    return ids.int(), logprobs.half(), tail.half()


def _check_scores(model: Model, tokenizer: Tokenizer) -> None:
    """Make sure that the output layer's scores are the model's own, and cover the tokenizer.

    Some models cap or scale them afterwards (Gemma 2, Cohere); to leave that out would go unnoticed.
    """
    import torch

    ids = [tokenizer.eos_token_id] * PROBE_TOKENS
    with torch.inference_mode():
        own = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits.float()
        ours = model.get_output_embeddings()(_states(model, [ids])).float()
    name = type(model).__name__
    if own.shape != ours.shape or not torch.allclose(own, ours, rtol=0.02, atol=0.02, equal_nan=True):
        raise ValueError(
            f"label.top_logits: {name} changes its scores after the output layer, expected it to leave them;"
            " set label.top_logits: 0, or take another teacher"
        )
    if own.shape[-1] < len(tokenizer):
        raise ValueError(
            f"label.top_logits: {name} scores {own.shape[-1]} tokens, expected the tokenizer's"
            f" {len(tokenizer)}; take the tokenizer that belongs to the weights"
        )


def _check_answers(model: Model, tokenizer: Tokenizer, labeled_path: str) -> int:
    """Return how many answers there are; one without room is told before hours are spent on the others."""
    longest = getattr(model.config, "max_position_embeddings", None) or 2**31
    count = 0
    for record in iter_records(labeled_path):
        tokens = len(_tokenized(tokenizer, record).inputs)
        if tokens > longest:
            raise ValueError(
                f"{labeled_path}: record {count}: prompt and answer have {tokens} tokens, expected at most"
                f" the {longest} of the teacher's context; drop the record, or set label.top_logits: 0"
            )
        count += 1
    return count


class _Told:
    """Says every so often how many answers are scored, on stderr and in a log."""

    def __init__(self, total: int, log_path: str) -> None:
        self.total, self.log_path = total, log_path
        self.answers = self.tokens = 0
        self._began = self._reported = time.monotonic()

    def add(self, rows: list[TopRow]) -> None:
        self.answers += len(rows)
        self.tokens += sum(len(row.tokens) for row in rows)
        now = time.monotonic()
        if self.answers == self.total or now - self._reported > REPORT_EVERY_SEC:
            self._reported = now
            speed = self.tokens / max(now - self._began, 1e-9)
            line = f"label: {self.answers} of {self.total} answers scored, {speed:.0f} tokens/s"
            tell(line, self.log_path)
