"""The teacher's answers to instructions, and which of them are worth training on."""

import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import tee
from typing import Any, Literal

from distill_app.core.errors import EmptyDataError
from distill_app.core.files import Record, iter_records, new_json_list
from distill_app.core.models import Model, Tokenizer
from distill_app.core.prompts import Mode, user_content
from distill_app.generation.answers import Answer, Engine, Sampling
from distill_app.generation.identity import model_identity
from distill_app.generation.in_process import InProcess
from distill_app.generation.own_settings import SETTINGS, own_settings
from distill_app.labeling.ask import fill_store, read_answers
from distill_app.labeling.choosing import Chooser, choose_answer, whole_answers
from distill_app.labeling.params import LabelParams
from distill_app.labeling.progress import tell
from distill_app.labeling.scoring import Case, Scores, open_scorer
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
        store: a folder that keeps the answers; what it holds of these weights is not asked again.
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
        self.choices: Counter[str] = Counter()  # why an answer of several was kept, or none
        self.agreeing = self.whole = self.first = self.sampled_tokens = 0
        self.verdicts: Counter[str] = Counter()
        self.margins: list[float] = [0, 0.0]  # how many there are, and their sum

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

    def best(
        self, answers: Sequence[Answer], reference: str, chooser: Chooser, scores: Scores
    ) -> tuple[Answer, str | None]:
        """Count the answers to a prompt; return the one to keep, or one that is not and why."""
        if len(answers) == 1:
            return answers[0], self.fault(answers[0])
        choice = choose_answer(answers, reference, chooser, scores.by_place)
        self.choices[choice.why] += 1
        self.verdicts.update(read=scores.read, unread=scores.unread)
        if choice.place is not None:
            self.agreeing += choice.agreeing
            self.whole += len(whole_answers(answers))
            self.first += choice.place == 0
        if choice.margin is not None:
            self.margins = [self.margins[0] + 1, self.margins[1] + choice.margin]
        self.sampled_tokens += sum(answer.tokens for answer in answers)
        if choice.place is not None:
            return answers[choice.place], self.fault(answers[choice.place])
        fault = self.fault(answers[0])
        if fault is None:
            fault = choice.why
            self.dropped[fault] = self.dropped.get(fault, 0) + 1
        return answers[0], fault

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
            **({"samples": self._samples()} if self.choices else {}),
        }

    def _samples(self) -> dict[str, Any]:
        """Return how often which choice was made, how clear it was, and what all samples took.

        `first` counts the prompts of which the first sample was kept, `agreeing_share` is that of whole
        samples that say what the kept one says, `margin_mean` the mean of `Choice.margin` where there is one.
        """
        margins = {"margin_mean": round(self.margins[1] / self.margins[0], 4)} if self.margins[0] else {}
        verdicts = {"verdicts": dict(self.verdicts)} if self.verdicts.total() else {}
        return {
            "chosen": dict(sorted(self.choices.items())),
            "first": self.first,
            "agreeing_share": round(self.agreeing / max(self.whole, 1), 4),
            **margins,
            **verdicts,
            "tokens_out": self.sampled_tokens,
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


def tell_hosted_limits(params: LabelParams) -> None:
    """Say, before an answer is paid for, what a verdict cannot have of a teacher behind a server."""
    if params.engine == "openai":
        print(
            f"label: {params.teacher} is behind a server: its verdict will rest on answers, benchmarks that"
            " it writes answers to, a judge and the server's own times; fidelity and benchmarks of choices"
            " need weights, which measure.teacher can name",
            file=sys.stderr,
            flush=True,
        )


def sampling_of(params: LabelParams) -> Sampling:
    """Return how the teacher's tokens are chosen, by the params or, where they say so, by its own file.

    Raises:
        OSError: the teacher's file is not to be had.
        ValueError: a server's model, whose file nobody sees, or a file that is not JSON.
    """
    chosen = params.model_dump(include=set(SETTINGS))
    if params.generation_config:
        if params.engine == "openai":
            raise ValueError(
                "label.generation_config: found true with label.engine: openai, expected false; write the"
                " settings of the server's model into the params"
            )
        chosen |= own_settings(params.teacher, params.revision)
    return Sampling(params.max_new_tokens, seed=params.seed, stop=tuple(params.stop), **chosen)


def tell_own_settings(params: LabelParams) -> None:
    """Say where the teacher's own file would choose tokens in another way, and whether it does."""
    if params.engine == "openai":
        return
    own = own_settings(params.teacher, params.revision)
    other = {name: value for name, value in own.items() if value != getattr(params, name)}
    if other:
        said = ", ".join(f"{name} {value:g}" for name, value in other.items())
        used = "which is used" if params.generation_config else "which label.generation_config: false leaves"
        print(f"label: {params.teacher}'s own file says {said}, {used}", file=sys.stderr, flush=True)


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
    sampling, retry_to = sampling_of(params), _retry_bound(params)
    sources = [source for source, _ in splits.values()]
    # Read once before anything is paid for: a fault in the last record must not come after hours.
    total = sum(1 for source in sources for _ in iter_records(source))

    def prompts() -> Iterator[str]:
        for source in sources:
            yield from _rendered(engine, iter_records(source), "system1")

    samplings = _samplings(sampling, params.samples)

    def cases(source: str) -> Iterator[tuple[Record, Case]]:
        records, read = tee(iter_records(source))  # a few hundred records apart
        rendered, *asked = tee(_rendered(engine, read, "system1"), 1 + params.samples)
        answered = [
            read_answers(engine, some, each, store, retry_to)
            for some, each in zip(asked, samplings, strict=True)
        ]
        for record, prompt, *answers in zip(records, rendered, *answered, strict=True):
            yield record, Case(user_content(record["instruction"], record["input"]), prompt, answers)

    counts: dict[str, Any] = {}
    with ExitStack() as files:
        scorer = files.enter_context(closing(open_scorer(engine, store, params)))
        for number, each in enumerate(samplings, 1):
            title = f"label, sample {number} of {params.samples}" if params.samples > 1 else "label"
            fill_store(engine, prompts, each, store, retry_to, total, title, log_path)
        scorer.prepare(lambda: (case for source in sources for _, case in cases(source)), log_path)
        add_dropped = files.enter_context(new_json_list(dropped_path))
        for split, (source, target) in splits.items():
            add = files.enter_context(new_json_list(target))
            tally = _Tally(params.on_truncated)
            asked, scored = tee(cases(source))
            for (record, case), scores in zip(asked, scorer.scores(c for _, c in scored), strict=True):
                answer, fault = tally.best(case.answers, record["output"], params.choose, scores)
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


def _samplings(sampling: Sampling, samples: int) -> list[Sampling]:
    """Return the sampling of each sample; the first is that of a run without others."""
    if samples > 1 and not sampling.temperature:
        raise ValueError(
            f"label.samples: found {samples} with temperature 0, expected 1, for all would be the same;"
            " raise label.temperature"
        )
    return [replace(sampling, seed=sampling.seed + number) for number in range(samples)]


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
