"""Measuring the five models: the teacher, each student, each student before distillation."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_app.comparison.params import CompareParams
from distill_app.comparison.scores import (
    count_steps,
    is_right,
    mean_token_loss,
    overlap_score,
    summary_of_reasoning,
)
from distill_app.core.files import Record
from distill_app.core.models import (
    Model,
    Quantization,
    Tokenizer,
    load_student,
    load_teacher,
)
from distill_app.core.prompts import Mode, format_prompt, format_response, teacher_prompt
from distill_app.labeling.answers import Answer, Sampling
from distill_app.labeling.engine import generate, stream_answers
from distill_app.labeling.progress import Progress

ROLES = ("teacher", "before", "student")


@dataclass(frozen=True)
class Compared:
    """The models of one system: Hub ids or folders."""

    teacher: str
    quantization: Quantization
    revision: str | None
    before: str
    student: str


def measure_system(
    mode: Mode, models: Compared, records: Sequence[Record], params: CompareParams
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a system's scores a role, and each prompt with its answers side by side.

    Args:
        records: held-out; the output is the teacher's answer (System 1) or a verified trace (System 2).
    """
    scores: dict[str, Any] = {"prompts": len(records)}
    rows = [_row(record) for record in records]
    for role in ROLES:
        model, tokenizer = _load(models, role)
        prompts = _prompts(tokenizer, role, mode, records)
        answers = _answers(model, tokenizer, prompts, params, f"compare {mode} {role}")
        if mode == "system1":
            found = _score_instructions(model, tokenizer, role, prompts, answers, records)
            texts: list[dict[str, Any]] = [{"text": a.text} for a in answers]
        else:
            texts = [_judged(a, r) for a, r in zip(answers, records, strict=True)]
            found = summary_of_reasoning(texts)
        size = {"parameters": model.num_parameters(), "bytes": _bytes_of(model, models, role)}
        scores[role] = {**found, **_speed(model, tokenizer, prompts, params), **size}
        for row, text in zip(rows, texts, strict=True):
            row[role] = text
    return scores, rows


def _load(models: Compared, role: str) -> tuple[Model, Tokenizer]:
    if role == "teacher":
        return load_teacher(models.teacher, models.quantization, models.revision)
    return load_student(getattr(models, role))


def _row(record: Record) -> dict[str, Any]:
    prompt = record["instruction"] + (f"\n{record['input']}" if record["input"] else "")
    return {"prompt": prompt, "reference": record["output"]}


def _prompts(tokenizer: Tokenizer, role: str, mode: Mode, records: Sequence[Record]) -> list[str]:
    if role == "teacher":
        return [teacher_prompt(tokenizer, r["instruction"], r["input"], mode) for r in records]
    return [format_prompt(r["instruction"], r["input"], mode) for r in records]


def _answers(
    model: Model, tokenizer: Tokenizer, prompts: list[str], params: CompareParams, label: str
) -> list[Answer]:
    sampling = Sampling(params.max_new_tokens)
    answers: dict[int, Answer] = {}
    with Progress(label, len(prompts)) as progress:
        for place, answer in stream_answers(model, tokenizer, prompts, sampling, params.batch_size):
            answers[place] = answer
            progress.add(1, asked=1, tokens=answer.tokens)
    return [answers[place] for place in range(len(prompts))]


def _speed(model: Model, tokenizer: Tokenizer, prompts: list[str], params: CompareParams) -> dict[str, float]:
    """Return tokens per second of `speed_prompts` prompts at once, and seconds for one alone.

    Every model does the same work, `speed_tokens` a prompt, however soon its own answers would end. The
    best of `speed_rounds` counts: what else the machine does can only make a round slower.
    """
    sampling = Sampling(params.speed_tokens, stop_at_eos=False)
    asked = prompts[: params.speed_prompts]

    def best_seconds(some: list[str]) -> float:
        rounds = []
        for _ in range(params.speed_rounds):
            start = time.perf_counter()
            generate(model, tokenizer, some, sampling, len(some))
            rounds.append(time.perf_counter() - start)
        return min(rounds)

    return {
        "tokens_per_sec": round(len(asked) * params.speed_tokens / best_seconds(asked), 1),
        "latency_sec": round(best_seconds(prompts[:1]), 3),
    }


def _score_instructions(
    model: Model,
    tokenizer: Tokenizer,
    role: str,
    prompts: list[str],
    answers: list[Answer],
    records: Sequence[Record],
) -> dict[str, float]:
    lead = (lambda text: text) if role == "teacher" else format_response
    responses = [lead(r["output"]) for r in records]
    return {
        "loss": round(mean_token_loss(model, tokenizer, prompts, responses), 4),
        "chrf": overlap_score([a.text for a in answers], [r["output"] for r in records]),
    }


def _judged(answer: Answer, record: Record) -> dict[str, Any]:
    return {
        "text": answer.text,
        "right": is_right(answer.text, record["output"]),
        "steps": count_steps(answer.text),
        "cut": answer.finish_reason == "length",
    }


def _bytes_of(model: Model, models: Compared, role: str) -> int:
    """Return the size on disk, or in memory for a model of the Hub."""
    files = list(Path(getattr(models, role)).glob("*.safetensors"))
    return sum(f.stat().st_size for f in files) if files else int(model.get_memory_footprint())
