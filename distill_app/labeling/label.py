"""The teacher's answers to instructions, and which of them are worth training on."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import tee
from typing import Any, Literal

from distill_app.core.errors import EmptyDataError
from distill_app.core.files import Record, iter_records, new_json_list
from distill_app.core.models import Model, Tokenizer
from distill_app.core.prompts import Mode
from distill_app.labeling.answers import Answer, Engine, Sampling
from distill_app.labeling.ask import fill_store, read_answers
from distill_app.labeling.engines import model_identity
from distill_app.labeling.in_process import InProcess
from distill_app.labeling.params import LabelParams
from distill_app.labeling.progress import tell
from distill_app.labeling.store import AnswerStore

OnTruncated = Literal["drop", "keep", "retry"]
SHOWN = 3  # dropped instructions that are told on the terminal
SHOWN_CHARACTERS = 60


def label_with_teacher(
    teacher_model: Model,
    teacher_tokenizer: Tokenizer,
    items: Sequence[Mapping[str, str]],
    batch_size: int = 2,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_p: float = 0.9,
    mode: Mode = "system1",
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
) -> list[dict[str, str]]:
    """Return the items with the teacher's answer as `output`, all of them and in their order.

    An answer cut at `max_new_tokens` is kept as it is; `ask_teacher` and `select_answers` tell them apart.

    Args:
        items: `{instruction, input}`; `input` may be absent, an `output` is replaced.
        store: a file that keeps the answers; what it holds of these weights is not asked again.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    answers = ask_teacher(teacher_model, teacher_tokenizer, items, sampling, batch_size, mode, store=store)
    return [{**_as_record(i), "output": a.text} for i, a in zip(items, answers, strict=True)]


def ask_teacher(
    model: Model,
    tokenizer: Tokenizer,
    items: Sequence[Mapping[str, str]],
    sampling: Sampling,
    batch_size: int,
    mode: Mode,
    label: str = "",
    store: str | os.PathLike[str] | None = None,
) -> list[Answer]:
    """Return one answer an item; identical prompts are asked once, what the store holds is not asked."""
    name = getattr(model.config, "_name_or_path", "") or "a model in memory"
    identity = model_identity(model, tokenizer) if store is not None else {}
    engine = InProcess(name, identity, tokenizer, lambda: model, batch_size)

    def prompts() -> Iterator[str]:
        return _rendered(engine, items, mode)

    with AnswerStore(store) as answers:
        fill_store(engine, prompts, sampling, answers, total=len(items), label=label)
        return list(read_answers(engine, prompts(), sampling, answers))


def select_answers(
    items: Sequence[Mapping[str, str]], answers: Sequence[Answer], on_truncated: OnTruncated
) -> tuple[list[Record], dict[str, Any]]:
    """Return the records worth training on, and counts: what was asked, kept, dropped and why.

    An empty answer and a refused one are always dropped; one cut by the token limit as `on_truncated`
    says, since a student trained on it would learn to stop in mid-sentence.
    """
    tally = _Tally(on_truncated)
    kept: list[Record] = [
        {**_as_record(item), "output": answer.text}
        for item, answer in zip(items, answers, strict=True)
        if not tally.fault(answer)
    ]
    return kept, tally.counts()


class _Tally:
    """Judges answers one by one and counts them, in memory that does not grow with their number."""

    def __init__(self, on_truncated: OnTruncated) -> None:
        self.on_truncated = on_truncated
        self.dropped = {"empty": 0, "truncated": 0, "refused": 0}
        self.lengths: Counter[int] = Counter()
        self.tokens_in = 0

    def fault(self, answer: Answer) -> str | None:
        """Count an answer; return why it is not worth training on, or None if it is."""
        self.lengths[answer.tokens] += 1
        self.tokens_in += answer.prompt_tokens
        fault = None
        if answer.finish_reason == "refused":
            fault = "refused"
        elif not answer.text:
            fault = "empty"
        elif answer.finish_reason == "length" and self.on_truncated != "keep":
            fault = "truncated"
        if fault:
            self.dropped[fault] += 1
        return fault

    def counts(self) -> dict[str, Any]:
        asked = self.lengths.total()
        tokens_out = sum(length * count for length, count in self.lengths.items())
        return {
            "instructions": asked,
            "kept": asked - sum(self.dropped.values()),
            "dropped": dict(self.dropped),
            "tokens_in": self.tokens_in,
            "tokens_out": tokens_out,
            "tokens_mean": round(tokens_out / max(asked, 1), 1),
            "tokens_p95": self._at_rank(math.ceil(0.95 * asked) - 1),
        }

    def _at_rank(self, rank: int) -> int:
        for length in sorted(self.lengths):
            rank -= self.lengths[length]
            if rank < 0:
                return length
        return 0


def _as_record(item: Mapping[str, str]) -> Record:
    return {"instruction": item["instruction"], "input": item.get("input") or ""}


def _rendered(engine: Engine, items: Iterable[Mapping[str, str]], mode: Mode) -> Iterator[str]:
    return (engine.render(item["instruction"], item.get("input") or "", mode) for item in items)


def label_files(
    engine: Engine,
    store: AnswerStore,
    params: LabelParams,
    splits: Mapping[str, tuple[str, str]],
    dropped_path: str,
    log_path: str,
) -> dict[str, Any]:
    """Write each split's instructions with the teacher's answers; return counts of each split.

    Instructions and answers are streamed: memory does not grow with their number.

    Args:
        splits: by name, the file of instructions and the file of labelled records to write.
        dropped_path: gets the instructions whose answer is not worth training on, each with the reason.
        log_path: gets progress and speed.

    Raises:
        EmptyDataError: no answer of a split is worth keeping; no file is written.
        FileNotFoundError, OSError, ValueError: from the files, the store or the engine; one line.
    """
    sampling = Sampling(params.max_new_tokens, params.temperature, params.top_p, params.seed)
    retry_to = _retry_bound(params)
    sources = [source for source, _ in splits.values()]
    # Read once before anything is paid for: a fault in the last record must not come after hours.
    total = sum(1 for source in sources for _ in iter_records(source))

    def prompts() -> Iterator[str]:
        for source in sources:
            yield from _rendered(engine, iter_records(source), "system1")

    fill_store(engine, prompts, sampling, store, retry_to, total, "label", log_path)
    counts: dict[str, Any] = {}
    with ExitStack() as files:
        add_dropped = files.enter_context(new_json_list(dropped_path))
        for split, (source, target) in splits.items():
            add = files.enter_context(new_json_list(target))
            tally = _Tally(params.on_truncated)
            records, asked = tee(iter_records(source))  # the two run a few hundred records apart
            rendered = _rendered(engine, asked, "system1")
            answers = read_answers(engine, rendered, sampling, store, retry_to)
            for record, answer in zip(records, answers, strict=True):
                fault = tally.fault(answer)
                if fault is None:
                    add({**_as_record(record), "output": answer.text})
                    continue
                add_dropped({"split": split, "reason": fault, **_as_record(record), "answer": answer.text})
                if sum(tally.dropped.values()) <= SHOWN:
                    tell(f"label: {split}: left out ({fault}): {_shown(record)}", log_path)
            counts[split] = tally.counts()
        if empty := [split for split, count in counts.items() if not count["kept"]]:
            raise EmptyDataError(
                f"label: no usable answer in {' and '.join(empty)} ({counts[empty[0]]});"
                " raise label.max_new_tokens, or set label.on_truncated: keep"
            )
    if left_out := sum(count["instructions"] - count["kept"] for count in counts.values()):
        tell(f"label: {left_out} instructions left out, all in {dropped_path}", log_path)
    return counts


def _retry_bound(params: LabelParams) -> int | None:
    if params.on_truncated != "retry":
        return None
    if params.retry_max_new_tokens <= params.max_new_tokens:
        raise ValueError(
            f"label.retry_max_new_tokens: found {params.retry_max_new_tokens}, expected more than"
            f" label.max_new_tokens ({params.max_new_tokens}) where label.on_truncated is retry"
        )
    return params.retry_max_new_tokens


def _shown(record: Mapping[str, str]) -> str:
    text = " ".join(record["instruction"].split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
