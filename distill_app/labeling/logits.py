"""How likely the teacher finds given answers, token by token: its likeliest tokens and what is beyond.

The answers are fixed, so one forward pass scores all tokens of many answers (teacher forcing). They are the
teacher's own for System 1, and the reasoning traces of the dataset for System 2.

Answers are scored a window at a time, and each window is a file under the work folder until all are: so a run
that was killed goes on with the first window that it lacks.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from distill_app.core.errors import EngineGone
from distill_app.core.files import Record, iter_records
from distill_app.core.logits import (
    FORMAT,
    TAIL_FLOOR,
    About,
    TopRow,
    join_top_logits,
    new_top_logits,
    tokenizer_digest,
)
from distill_app.core.models import (
    Model,
    Quantization,
    Tokenizer,
    compute_dtype,
    load_teacher,
    load_tokenizer,
)
from distill_app.core.prompts import Mode, teacher_prompt
from distill_app.core.stage import die_with_parent
from distill_app.generation.identity import resolve_weights
from distill_app.generation.memory import release_memory
from distill_app.labeling.likelihood import PASS_TOKENS, ReadText
from distill_app.labeling.params import LabelParams
from distill_app.labeling.progress import REPORT_EVERY_SEC, tell

WINDOW_TOKENS = 16 * PASS_TOKENS  # of answers that are scored together, those of like length side by side
HEAD_CELLS = 2**25  # logits held at a time, 128 MiB in float32
PROBE_TOKENS = 8
WORK_DIR = "work/logits"
PARAMS: dict[Mode, str] = {"system1": "label.top_logits", "system2": "score_s2.top_logits"}


def check_top_logits(params: LabelParams, mode: Mode = "system1") -> None:
    """Make sure that the teacher can give what `top_logits` asks for; no model is loaded.

    Raises:
        FileNotFoundError, OSError: the teacher's tokenizer is not to be had.
        ValueError: the engine has no weights here, or the vocabulary is too small.
    """
    if not params.top_logits:
        return
    if params.engine == "openai":
        raise ValueError(
            f"{PARAMS[mode]}: found {params.top_logits} with label.engine: openai, expected 0, for a server"
            " keeps its weights; take engine transformers or vllm"
        )
    tokenizer = load_tokenizer(params.teacher, params.revision)
    if params.top_logits > len(tokenizer):
        raise ValueError(
            f"{PARAMS[mode]}: found {params.top_logits}, expected at most the {len(tokenizer)} tokens of"
            f" {params.teacher}; lower it"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{params.teacher}: the tokenizer has no eos_token, which ends every scored answer;"
            f" give it one, or set {PARAMS[mode]}: 0"
        )


def write_top_logits(
    params: LabelParams, labeled_path: str, logits_path: str, log_path: str, mode: Mode = "system1"
) -> int:
    """Write the teacher's likeliest tokens for each answer of a labelled file, in the file's order.

    With `top_logits: 0` no model is loaded and the file has no row. Memory does not grow with the number of
    answers. What is scored lies in WORK_DIR until all is, and is not scored again by a run that goes on.

    Args:
        params: whose `top_logits` is that of the answers' system.
        log_path: gets progress and speed.
        mode: the system that the answers are for, in whose words the teacher is asked.

    Returns:
        How many answers the file has.

    Raises:
        FileNotFoundError, OSError, ValueError: from the files, the params or the teacher; one line.
    """
    if not params.top_logits:
        join_top_logits(logits_path, About(0, 0, "", ""), [])
        return 0
    check_top_logits(params, mode)
    scoring = _Scoring(params, labeled_path, Path(WORK_DIR, Path(logits_path).stem), log_path, mode)
    join_top_logits(logits_path, scoring.about, scoring.parts())
    shutil.rmtree(scoring.folder, ignore_errors=True)
    return scoring.progress.total


@dataclass(frozen=True)
class _Teacher:
    """What a process needs to load the teacher; `param` is the one that asks for it, for errors."""

    name: str
    revision: str | None
    quantization: Quantization
    param: str


@dataclass(frozen=True)
class _Task:
    """A window to score into a file; `first` is the number of its first answer."""

    teacher: _Teacher
    about: About
    labeled_path: str
    first: int
    window: list[ReadText]
    part: Path


class _Scoring:
    """A labelled file's answers, scored window by window into files of a folder."""

    def __init__(
        self, params: LabelParams, labeled_path: str, folder: Path, log_path: str, mode: Mode
    ) -> None:
        self.params, self.labeled_path, self.folder, self.mode = params, labeled_path, folder, mode
        self.weights, revision = resolve_weights(params.teacher, params.revision)
        self.teacher = _Teacher(params.teacher, revision, params.quantization, PARAMS[mode])
        self.tokenizer = load_tokenizer(params.teacher, revision)
        digest = tokenizer_digest(self.tokenizer)
        self.about = About(params.top_logits, len(self.tokenizer), digest, params.teacher)
        title = PARAMS[mode].partition(".")[0]
        self.progress = _Progress(title, self._check_answers(), log_path)

    def parts(self) -> list[Path]:
        """Score what is lacking; return the windows' files, in the answers' order."""
        parts: list[Path] = []
        for lengths in _run(self._lacking(parts), *_processes(self.params)):
            self.progress.add(lengths)
        return parts

    def _lacking(self, parts: list[Path]) -> Iterator[_Task]:
        """Yield the windows that no earlier run has scored; note each window's file."""
        first = 0
        for window in _windows(self._rows()):
            parts.append(self.folder / f"{self._key(window)}.arrow")
            if parts[-1].is_file():
                self.progress.skip(len(window))
            else:
                yield _Task(self.teacher, self.about, self.labeled_path, first, window, parts[-1])
            first += len(window)

    def _rows(self) -> Iterator[ReadText]:
        system = self.params.system_prompt
        records = iter_records(self.labeled_path)
        return (tokenized(self.tokenizer, record, self.mode, system) for record in records)

    def _key(self, window: Sequence[ReadText]) -> str:
        """Return a hash of all that decides what is written for a window."""
        made_by = {
            "format": FORMAT,
            "weights": self.weights,
            "quantization": self.params.quantization,
            "dtype": compute_dtype(),
            "pass_tokens": PASS_TOKENS,
            "versions": [version(name) for name in ("torch", "transformers")],
            **asdict(self.about),
        }
        rows = [(row.start, row.ids) for row in window]
        return hashlib.sha256(json.dumps([made_by, rows]).encode()).hexdigest()

    def _check_answers(self) -> int:
        """Return how many answers there are; one too long is an error before any is scored."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.teacher.name, revision=self.teacher.revision)
        longest = getattr(config, "max_position_embeddings", None) or 2**31
        count = 0
        for row in self._rows():
            if len(row.inputs) > longest:
                raise ValueError(
                    f"{self.labeled_path}: record {count}: prompt and answer have {len(row.inputs)} tokens,"
                    f" expected at most the {longest} of the teacher's context; drop the record, or set"
                    f" {PARAMS[self.mode]}: 0"
                )
            count += 1
        return count


def _processes(params: LabelParams) -> tuple[int, int]:
    """Return how many processes score here, each with a copy of the teacher, and how many GPUs each has."""
    if params.engine_workers == 1:
        return 1, 0
    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        return params.engine_workers, 0
    return min(params.engine_workers, max(1, gpus // params.gpus_per_worker)), params.gpus_per_worker


def _run(tasks: Iterator[_Task], processes: int, gpus: int) -> Iterator[list[int]]:
    """Yield the answers' lengths of each task, scored in this process or in others.

    Raises:
        EngineGone: one of the others has ended.
    """
    release_memory()  # what the engine that wrote the answers has left
    if processes == 1:
        try:
            yield from map(_score_window, tasks)
        finally:
            _load.cache_clear()
        return
    context = multiprocessing.get_context("spawn")
    started = context.Value("i", 0)
    waiting: deque[Future[list[int]]] = deque()
    with ProcessPoolExecutor(processes, context, _take_gpus, (started, gpus)) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(_score_window, task))
                if len(waiting) >= 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as err:
            raise EngineGone(
                f"one of the {processes} processes that score answers has ended, perhaps for want of memory;"
                " run again, what is scored is kept, or lower label.engine_workers"
            ) from err


def _take_gpus(started: Any, gpus: int) -> None:
    """Give this process GPUs of its own, before torch looks for them."""
    die_with_parent()
    with started.get_lock():
        first = started.value * gpus
        started.value += 1
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(first + gpus)))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[first : first + gpus])


def _score_window(task: _Task) -> list[int]:
    """Write a window's file; return how many tokens each answer has.

    Raises:
        ValueError: the teacher gives logits that are not finite; the record is named.
    """
    rows = score_answers(_load(task.teacher), task.window, task.about.top, task.about.vocab_size)
    with new_top_logits(task.part, task.about) as add:
        for number, row in enumerate(rows, start=task.first):
            if not np.isfinite(row.tail).all():
                raise ValueError(
                    f"{task.labeled_path}: record {number}: found logits of {task.teacher.name} that are NaN"
                    f" or infinite, expected numbers; check its weights, or set {task.teacher.param}: 0"
                )
            add(row)
    return [len(row.tokens) for row in rows]


@lru_cache(maxsize=1)
def _load(teacher: _Teacher) -> Model:
    model, tokenizer = load_teacher(teacher.name, teacher.quantization, teacher.revision)
    check_logits(model, tokenizer, teacher.param)
    return model


def tokenized(tokenizer: Tokenizer, record: Record, mode: Mode, system_prompt: str | None = None) -> ReadText:
    """Return a record as the teacher reads it; the answer's tokens are those of `output` alone."""
    text = teacher_prompt(tokenizer, record["instruction"], record["input"], mode, system_prompt)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = tokenizer(record["output"], add_special_tokens=False)["input_ids"]
    return ReadText([*prompt, *answer, tokenizer.eos_token_id], len(prompt))


def _windows(rows: Iterable[ReadText]) -> Iterator[list[ReadText]]:
    window: list[ReadText] = []
    tokens = 0
    for row in rows:
        window.append(row)
        tokens += len(row.ids)
        if tokens >= WINDOW_TOKENS:
            yield window
            window, tokens = [], 0
    if window:
        yield window


def score_answers(model: Model, window: Sequence[ReadText], top: int, vocab_size: int) -> list[TopRow]:
    """Return what the model finds likeliest at each token of each answer, in the rows' order.

    Args:
        vocab_size: the tokenizer's tokens, over which probabilities add up to one; output rows beyond them,
            with which models are padded, take no part.

    Returns:
        Where a logit is NaN or infinite, the token's `tail` is NaN.
    """
    scored: dict[int, TopRow] = {}
    for places in _passes(window):
        found = _score(model, [window[place] for place in places], top, vocab_size)
        scored.update(zip(places, found, strict=True))
    return [scored[place] for place in range(len(window))]


def _passes(window: Sequence[ReadText]) -> Iterator[list[int]]:
    """Yield the places of the rows of each pass, longest first."""
    places = sorted(range(len(window)), key=lambda place: -len(window[place].inputs))
    while places:
        count = max(1, PASS_TOKENS // len(window[places[0]].inputs))
        yield places[:count]
        places = places[count:]


def _score(model: Model, rows: Sequence[ReadText], top: int, vocab_size: int) -> list[TopRow]:
    """Return each row's answer, scored in one pass; only the answers go through the output layer."""
    import torch

    width = max(len(row.inputs) for row in rows)
    # No mask: padding stands right of all that is read, where causal attention does not look
    padded = [row.inputs + [0] * (width - len(row.inputs)) for row in rows]
    with torch.inference_mode():
        hidden = _hidden_states(model, padded)
        # The token at a place is predicted one place before it
        hidden = torch.cat([hidden[i, row.start - 1 : len(row.inputs)] for i, row in enumerate(rows)])
        head = model.get_output_embeddings()
        chunks = hidden.split(max(1, HEAD_CELLS // vocab_size))
        parts = [_likeliest(head(chunk), top, vocab_size) for chunk in chunks]
        ids, logprobs, tail = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    scored, begin = [], 0
    for row in rows:
        tokens = np.array(row.answer, np.int32)
        end = begin + len(tokens)
        scored.append(TopRow(tokens, ids[begin:end], logprobs[begin:end], tail[begin:end]))
        begin = end
    return scored


def _hidden_states(model: Model, ids: list[list[int]]) -> Any:
    """Return what goes into the output layer, `(batch, tokens, hidden)`."""
    import torch

    batch = torch.tensor(ids, device=model.device)
    return model.get_decoder()(input_ids=batch, use_cache=False).last_hidden_state


def _likeliest(logits: Any, top: int, vocab_size: int) -> tuple[Any, Any, Any]:
    """Return ids `(rows, top)` int32, log-probabilities `(rows, top)` and tail `(rows,)` float32.

    Args:
        logits: `(rows, vocab or more)`; they are overwritten.
    """
    import torch

    logits = logits[:, :vocab_size].float()
    total = logits.logsumexp(-1, keepdim=True)
    best, ids = logits.topk(top, dim=-1)
    # A sum of its own: 1 minus the others would leave nothing of a small rest
    rest = logits.scatter_(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    tail = (rest - total).clamp(min=TAIL_FLOOR).masked_fill(~total.isfinite(), torch.nan)
    return ids.int(), (best - total).clamp(min=TAIL_FLOOR), tail.squeeze(-1)


def check_logits(model: Model, tokenizer: Tokenizer, param: str) -> None:
    """Make sure that the output layer's logits are the model's own, and cover the tokenizer.

    Some models cap or scale them afterwards (Gemma 2, Cohere); to leave that out would go unnoticed.
    """
    import torch

    ids = [tokenizer.eos_token_id] * PROBE_TOKENS
    with torch.inference_mode():
        own = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits.float()
        ours = model.get_output_embeddings()(_hidden_states(model, [ids])).float()
    name = type(model).__name__
    if own.shape != ours.shape or not torch.allclose(own, ours, rtol=0.02, atol=0.02, equal_nan=True):
        raise ValueError(
            f"{param}: {name} changes its logits after the output layer, expected it to leave them;"
            f" set {param}: 0, or take another teacher"
        )
    if own.shape[-1] < len(tokenizer):
        raise ValueError(
            f"{param}: {name} has logits of {own.shape[-1]} tokens, expected the tokenizer's"
            f" {len(tokenizer)}; take the tokenizer that belongs to the weights"
        )


class _Progress:
    """Says every so often how many answers are scored, on stderr and in a log."""

    def __init__(self, title: str, total: int, log_path: str) -> None:
        self.title, self.total, self.log_path = title, total, log_path
        self.answers = self.skipped = self.tokens = 0
        self._began = self._reported = time.monotonic()

    def skip(self, answers: int) -> None:
        """Count answers that an earlier run has scored."""
        self.answers += answers
        self.skipped += answers
        if self.answers == self.total:
            self._say()

    def add(self, lengths: Sequence[int]) -> None:
        """Count answers of so many tokens that are scored now."""
        self.answers += len(lengths)
        self.tokens += sum(lengths)
        if self.answers == self.total or time.monotonic() - self._reported > REPORT_EVERY_SEC:
            self._say()

    def _say(self) -> None:
        self._reported = time.monotonic()
        speed = self.tokens / max(self._reported - self._began, 1e-9)
        before = f", {self.skipped} of them by an earlier run" if self.skipped else ""
        line = f"{self.title}: {self.answers} of {self.total} answers scored{before}, {speed:.0f} tokens/s"
        tell(line, self.log_path)
