"""Asking the five models: the teacher, each student, and each student before distillation."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from distill_app.core.files import Record, read_records, save_json
from distill_app.core.models import Model, Tokenizer, load_teacher
from distill_app.core.prompts import Mode, format_prompt, format_response, teacher_prompt, user_content
from distill_app.labeling.answers import Answer, Sampling
from distill_app.labeling.ask import fill_store, read_answers
from distill_app.labeling.candidates import Candidate
from distill_app.labeling.engines import engine_identity, open_engine
from distill_app.labeling.in_process import InProcess
from distill_app.labeling.params import LabelParams
from distill_app.labeling.store import AnswerStore
from distill_app.measuring.cost import Loaded, measure_speed, peak_memory, size_of
from distill_app.measuring.judge import judge_pairs
from distill_app.measuring.params import MeasureParams
from distill_app.measuring.scores import chrf, count_steps, is_right, response_losses

Task = Literal["instructions", "reasoning"]
TASKS: dict[Task, Mode] = {"instructions": "system1", "reasoning": "system2"}


def measure_models(
    candidates: Sequence[Candidate],
    params: MeasureParams,
    label: LabelParams,
    data_dir: str,
    reports_dir: str,
) -> None:
    """Write answers.json, each prompt with the five answers and what each is worth, and costs.json.

    Each model is loaded once, and all stay until their speeds have been measured side by side. Answers come
    from the store of labels where it holds them.

    Raises:
        FileNotFoundError, ValueError: held-out data is missing, empty or malformed.
    """
    data, reports = Path(data_dir), Path(reports_dir)
    records: dict[Task, list[Record]] = {
        "instructions": read_records(data / "heldout_s1_labeled.json")[: params.instruction_prompts],
        "reasoning": read_records(data / "heldout_s2.json")[: params.reasoning_prompts],
    }
    answers: dict[Task, list[dict[str, Any]]] = {task: list(map(_row, records[task])) for task in records}
    costs: dict[str, dict[str, Any]] = {}
    loaded: dict[str, Loaded] = {}
    with AnswerStore(label.store) as store:
        for candidate in candidates:
            loaded[candidate.name], costs[candidate.name] = _measure(
                candidate, records, answers, params, label, store
            )
        for name, seconds in measure_speed(loaded, params).items():
            costs[name] |= seconds
        loaded.clear()
        if params.judge is not None:
            _judge(params, label, [c.name for c in candidates[1:]], answers["instructions"], store)
    save_json(reports / "answers.json", answers)
    save_json(reports / "costs.json", costs)


def _row(record: Record) -> dict[str, Any]:
    prompt = user_content(record["instruction"], record["input"])
    return {"prompt": prompt, "reference": record["output"]}


def _measure(
    candidate: Candidate,
    records: Mapping[Task, Sequence[Record]],
    answers: Mapping[Task, list[dict[str, Any]]],
    params: MeasureParams,
    label: LabelParams,
    store: AnswerStore,
) -> tuple[Loaded, dict[str, Any]]:
    """Add a model's answers to the rows of both tasks; return it, and its cost without speed."""
    where: dict[str, Any] = {
        "teacher": candidate.model,
        "revision": candidate.revision,
        "quantization": candidate.quantization,
        "engine": "transformers",
    }
    identity, revision = engine_identity(label.model_copy(update=where))
    model, tokenizer = load_teacher(candidate.model, candidate.quantization, revision)
    engine = InProcess(candidate.model, identity, tokenizer, lambda: model, params.batch_size)
    for task, rows in answers.items():
        prompts = [prompt_of(candidate, tokenizer, task, record) for record in records[task]]
        title = f"measure {candidate.name}, {task}"
        found = _ask(engine, prompts, Sampling(params.max_new_tokens), store, title)
        for row, answer in zip(rows, found, strict=True):
            row[candidate.name] = _judged(task, answer, row["reference"])
    prompts = [prompt_of(candidate, tokenizer, "instructions", record) for record in records["instructions"]]
    _add_losses(model, tokenizer, candidate, prompts, answers["instructions"])
    one = Loaded(model, tokenizer, prompts[: params.speed_prompts])
    return one, {
        "model": candidate.model,
        "weights": identity["weights"],
        "quantization": candidate.quantization,
        **size_of(model, candidate.model),
        "peak_memory_bytes": peak_memory(one, params),
    }


def _ask(
    engine: InProcess, prompts: list[str], sampling: Sampling, store: AnswerStore, title: str
) -> list[Answer]:
    fill_store(engine, lambda: prompts, sampling, store, total=len(prompts), label=title)
    return list(read_answers(engine, prompts, sampling, store))


def _judged(task: Task, answer: Answer, reference: str) -> dict[str, Any]:
    found = {"text": answer.text, "tokens": answer.tokens, "cut": answer.finish_reason == "length"}
    if task == "instructions":
        return {**found, "chrf": chrf(answer.text, reference)}
    return {**found, "right": is_right(answer.text, reference), "steps": count_steps(answer.text)}


def _add_losses(
    model: Model,
    tokenizer: Tokenizer,
    candidate: Candidate,
    prompts: Sequence[str],
    rows: Sequence[dict[str, Any]],
) -> None:
    """Add to each answer the loss of the reference, the teacher's answer, as this model would write it."""
    is_teacher = candidate.mode is None
    responses = [row["reference"] if is_teacher else format_response(row["reference"]) for row in rows]
    losses = response_losses(model, tokenizer, prompts, responses)
    for row, (nats, tokens) in zip(rows, losses, strict=True):
        row[candidate.name] |= {"reference_nats": round(nats, 4), "reference_tokens": tokens}


def prompt_of(candidate: Candidate, tokenizer: Tokenizer, task: Task, record: Record) -> str:
    """Return the text with which a model is asked; the teacher is told to think where it has to reason."""
    if candidate.mode is None:
        return teacher_prompt(tokenizer, record["instruction"], record["input"], TASKS[task])
    return format_prompt(record["instruction"], record["input"], candidate.mode)


def _judge(
    params: MeasureParams,
    label: LabelParams,
    names: Sequence[str],
    rows: Sequence[dict[str, Any]],
    store: AnswerStore,
) -> None:
    """Add to each student's answer how it did against the teacher's before the judge."""
    judge: dict[str, Any] = {
        "teacher": params.judge,
        "engine": params.judge_engine,
        "base_url": params.judge_base_url,
    }
    if params.judge != label.teacher:  # which is loaded as for the labels
        judge |= {"revision": None, "quantization": "none"}
    with closing(open_engine(label.model_copy(update=judge))) as engine:
        for name in names:
            pairs = [(row["prompt"], row["teacher"]["text"], row[name]["text"]) for row in rows]
            outcomes = judge_pairs(engine, pairs, store, f"measure {name}, judged by {params.judge}")
            for row, outcome in zip(rows, outcomes, strict=True):
                row[name]["against_teacher"] = list(outcome)
