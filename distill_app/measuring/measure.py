"""Asking the five models: the teacher, each student, and each student before distillation."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, Literal

from distill_app.core.files import Record, read_records, save_json
from distill_app.core.models import Tokenizer, load_teacher
from distill_app.core.prompts import Mode, format_prompt, format_response, teacher_prompt, user_content
from distill_app.core.stage import one_line
from distill_app.labeling.answers import Answer, Engine, Sampling, seed_of
from distill_app.labeling.ask import fill_store, read_answers
from distill_app.labeling.candidates import Candidate
from distill_app.labeling.engines import engine_identity, open_engine
from distill_app.labeling.in_process import InProcess
from distill_app.labeling.params import LabelParams
from distill_app.labeling.store import AnswerStore
from distill_app.measuring.cost import Loaded, has_room, measure_speed, peak_memory, size_of, with_room
from distill_app.measuring.judge import judge_pairs
from distill_app.measuring.params import MeasureParams
from distill_app.measuring.scores import chrf, count_steps, is_right, response_losses

Task = Literal["instructions", "reasoning"]
SAMPLE_SEED = 17
TASKS: dict[Task, Mode] = {"instructions": "system1", "reasoning": "system2"}


def measure_models(
    candidates: Sequence[Candidate],
    params: MeasureParams,
    label: LabelParams,
    data_dir: str,
    reports_dir: str,
) -> None:
    """Write answers.json, each prompt with the five answers and what each is worth, and costs.json.

    The judge is opened first. Each model is loaded once, and all stay until their speeds have been measured
    side by side. Answers come from the store of labels where it holds them.

    Raises:
        FileNotFoundError, ValueError: held-out data is missing, empty or malformed.
        ValueError: the judge cannot be had, or no prompt leaves all models room to measure their speed.
    """
    data, reports = Path(data_dir), Path(reports_dir)
    records: dict[Task, list[Record]] = {
        "instructions": _sample(data / "heldout_s1_labeled.json", params.instruction_prompts),
        "reasoning": _sample(data / "heldout_s2.json", params.reasoning_prompts),
    }
    answers: dict[Task, list[dict[str, Any]]] = {task: list(map(_row, records[task])) for task in records}
    with _open_judge(params, label) as judge, AnswerStore(label.store) as store:
        costs = _measure_all(candidates, records, answers, params, label, store)
        if judge is not None:
            _judge(judge, [c.name for c in candidates[1:]], answers["instructions"], store)
    save_json(reports / "answers.json", answers)
    save_json(reports / "costs.json", costs)


def _sample(path: Path, count: int) -> list[Record]:
    """Return so many records at most, chosen and ordered by a hash of their text, not by their place."""

    def place(record: Record) -> tuple[int, str]:
        return seed_of(_row(record)["prompt"], SAMPLE_SEED), record["output"]

    return sorted(read_records(path), key=place)[:count]


def _row(record: Record) -> dict[str, Any]:
    prompt = user_content(record["instruction"], record["input"])
    return {"prompt": prompt, "reference": record["output"]}


def _measure_all(
    candidates: Sequence[Candidate],
    records: Mapping[Task, Sequence[Record]],
    answers: Mapping[Task, list[dict[str, Any]]],
    params: MeasureParams,
    label: LabelParams,
    store: AnswerStore,
) -> dict[str, dict[str, Any]]:
    """Add the models' answers to the rows of both tasks; return what each model costs."""
    loaded = {one.name: _load(one, records["instructions"], label) for one in candidates}
    timed = with_room(loaded, params)
    costs = {}
    for candidate in candidates:
        one = loaded[candidate.name]
        _answer(candidate, one, records, answers, params, store)
        costs[candidate.name] = {
            "model": candidate.model,
            "weights": one.identity["weights"],
            "quantization": candidate.quantization,
            **size_of(one.model, candidate.model),
            "peak_memory_bytes": peak_memory(timed[candidate.name], params),
        }
    return {name: costs[name] | seconds for name, seconds in measure_speed(timed, params).items()}


def _load(candidate: Candidate, records: Sequence[Record], label: LabelParams) -> Loaded:
    where: dict[str, Any] = {
        "teacher": candidate.model,
        "revision": candidate.revision,
        "quantization": candidate.quantization,
        "engine": "transformers",
    }
    identity, revision = engine_identity(label.model_copy(update=where))
    model, tokenizer = load_teacher(candidate.model, candidate.quantization, revision)
    prompts = [prompt_of(candidate, tokenizer, "instructions", record) for record in records]
    return Loaded(model, tokenizer, identity, prompts)


def _answer(
    candidate: Candidate,
    one: Loaded,
    records: Mapping[Task, Sequence[Record]],
    answers: Mapping[Task, list[dict[str, Any]]],
    params: MeasureParams,
    store: AnswerStore,
) -> None:
    """Add a model's answers to the rows of both tasks."""
    engine = InProcess(candidate.model, one.identity, one.tokenizer, lambda: one.model, params.batch_size)
    for task, rows in answers.items():
        prompts = [prompt_of(candidate, one.tokenizer, task, record) for record in records[task]]
        title = f"measure {candidate.name}, {task}"
        found = _ask(engine, prompts, Sampling(params.max_new_tokens), store, title)
        for row, answer in zip(rows, found, strict=True):
            row[candidate.name] = _judged(task, answer, row["reference"])
    _add_losses(candidate, one, answers["instructions"])


def _ask(
    engine: InProcess, prompts: list[str], sampling: Sampling, store: AnswerStore, title: str
) -> list[Answer]:
    fill_store(engine, lambda: prompts, sampling, store, total=len(prompts), label=title)
    return list(read_answers(engine, prompts, sampling, store))


def _judged(task: Task, answer: Answer, reference: str) -> dict[str, Any]:
    found = {
        "text": answer.text,
        "tokens": answer.tokens,
        "cut": answer.finish_reason == "length",
        "refused": answer.finish_reason == "refused",  # too long for the model: it counts as failed
    }
    if task == "instructions":
        return {**found, "chrf": chrf(answer.text, reference)}
    return {**found, "right": is_right(answer.text, reference), "steps": count_steps(answer.text)}


def _add_losses(candidate: Candidate, one: Loaded, rows: Sequence[dict[str, Any]]) -> None:
    """Add to each answer the loss of the reference, the teacher's answer, as this model would write it.

    Where prompt and reference are too long for the model there is none.
    """
    is_teacher = candidate.mode is None
    responses = [row["reference"] if is_teacher else format_response(row["reference"]) for row in rows]
    texts = zip(rows, one.prompts, responses, strict=True)
    fitting = [found for found in texts if has_room(one, found[1] + found[2], 1)]
    losses = response_losses(
        one.model,
        one.tokenizer,
        [prompt for _, prompt, _ in fitting],
        [response for _, _, response in fitting],
    )
    for (row, _, _), (nats, tokens) in zip(fitting, losses, strict=True):
        row[candidate.name] |= {"reference_nats": round(nats, 4), "reference_tokens": tokens}


def prompt_of(candidate: Candidate, tokenizer: Tokenizer, task: Task, record: Record) -> str:
    """Return the text with which a model is asked; the teacher is told to think where it has to reason."""
    if candidate.mode is None:
        return teacher_prompt(tokenizer, record["instruction"], record["input"], TASKS[task])
    return format_prompt(record["instruction"], record["input"], candidate.mode)


def _open_judge(params: MeasureParams, label: LabelParams) -> AbstractContextManager[Engine | None]:
    """Return the judge's engine, which loads no weights yet, in this process or at a server; or none.

    Raises:
        ValueError: it cannot be had, said in the names of `measure`.
    """
    if params.judge is None:
        return nullcontext()
    if params.judge_engine == "openai" and not params.judge_base_url:
        raise ValueError(
            "measure.judge_base_url: found none, expected the server's address with measure.judge_engine:"
            " openai, for example http://localhost:8000/v1"
        )
    judge: dict[str, Any] = {
        "teacher": params.judge,
        "engine": params.judge_engine,
        "base_url": params.judge_base_url,
        "engine_workers": 1,  # where labelling runs says nothing of the judge
        "ray_address": None,
    }
    if params.judge != label.teacher:  # which is loaded as for the labels
        judge |= {"revision": None, "quantization": "none"}
    try:
        return closing(open_engine(label.model_copy(update=judge)))
    except (ValueError, OSError, ImportError) as err:
        said = one_line(err).replace("label.engine", "measure.judge_engine").replace(" or label.revision", "")
        raise ValueError(f"measure.judge: {said}") from err


def _judge(judge: Engine, names: Sequence[str], rows: Sequence[dict[str, Any]], store: AnswerStore) -> None:
    """Add to each student's answer how it did against the teacher's before the judge."""
    for name in names:
        pairs = [(row["prompt"], row["teacher"]["text"], row[name]["text"]) for row in rows]
        outcomes = judge_pairs(judge, pairs, store, f"measure {name}, judged by {judge.teacher}")
        for row, outcome in zip(rows, outcomes, strict=True):
            row[name]["against_teacher"] = list(outcome)
