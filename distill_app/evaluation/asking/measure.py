"""Asking the models: the teacher, each student, and each student before distillation.

What is written are texts, token counts, likelihoods and seconds; what they are worth is for `compare` to say,
so a new measure asks no model again.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

from distill_app.core.files import Record, read_records, save_json
from distill_app.core.logits import tokenizer_digest
from distill_app.core.prompts import format_prompt, format_response, user_content
from distill_app.evaluation.asking.contender import Contender, Task, open_contender
from distill_app.evaluation.asking.cost import Timed, size_of, time_answers
from distill_app.evaluation.asking.fidelity import forced_agreement
from distill_app.evaluation.asking.params import MeasureParams
from distill_app.evaluation.candidates import Candidate
from distill_app.generation.answers import Answer, Engine, Sampling, seed_of
from distill_app.labeling.ask import fill_store, read_answers
from distill_app.labeling.judge import Pair, judge_pairs, open_judge
from distill_app.labeling.likelihood import Reading, answer_nats
from distill_app.labeling.params import LabelParams
from distill_app.labeling.store import AnswerStore

SAMPLE_SEED = 17
AGAIN_TEMPERATURE = 0.8  # of the teacher's second answer, where its labels are greedy
Rows = dict[Task, list[dict[str, Any]]]


def measure_models(
    candidates: Sequence[Candidate],
    params: MeasureParams,
    label: LabelParams,
    data_dir: str,
    reports_dir: str,
) -> None:
    """Write answers.json, each prompt with what the models wrote and how likely, and costs.json.

    The judge is opened first. Each model answers the prompts of its own task, the teacher those of both.
    Answers come from the store of labels where it holds them; times never do.

    Raises:
        FileNotFoundError, ValueError: held-out data is missing, empty or malformed.
        ImportError, OSError, ValueError: a model, an engine or the judge cannot be had.
    """
    data, reports = Path(data_dir), Path(reports_dir)
    records: dict[Task, list[Record]] = {
        "instructions": _sample(data / "heldout_s1_labeled.json", params.instruction_prompts),
        "reasoning": _sample(data / "heldout_s2.json", params.reasoning_prompts),
    }
    rows: Rows = {task: list(map(_row, records[task])) for task in records}
    with ExitStack() as opened:
        judge = opened.enter_context(_open_judge(params, label))
        store = opened.enter_context(AnswerStore(label.store))
        contenders = {one.name: open_contender(one, params, label) for one in candidates}
        for one in contenders.values():
            opened.callback(one.close)
        times = _answer_all(contenders, records, rows, params, store)
        some = slice(params.fidelity_prompts)
        asked, answered = records["instructions"][some], rows["instructions"][some]
        _teacher_again(contenders["teacher"], asked, answered, params, label, store)
        _add_fidelity(contenders, asked, answered)
        costs = {name: _described(one) | times.get(name, {}) for name, one in contenders.items()}
        if judge is not None:
            _judge(judge, rows["instructions"], store, params)
    save_json(reports / "answers.json", rows)
    save_json(reports / "costs.json", costs)


def _sample(path: Path, count: int) -> list[Record]:
    """Return so many records at most, chosen and ordered by a hash of their text, not by their place."""

    def place(record: Record) -> tuple[int, str]:
        return seed_of(_row(record)["prompt"], SAMPLE_SEED), record["output"]

    return sorted(read_records(path), key=place)[:count]


def _row(record: Record) -> dict[str, Any]:
    prompt = user_content(record["instruction"], record["input"])
    return {"prompt": prompt, "reference": record["output"]}


def _answer_all(
    contenders: Mapping[str, Contender],
    records: Mapping[Task, Sequence[Record]],
    rows: Rows,
    params: MeasureParams,
    store: AnswerStore,
) -> dict[str, dict[str, Any]]:
    """Add the models' answers to the rows; return the times of the teacher and of both students.

    In this process all stay loaded and are timed side by side. vLLM takes the device for itself, so each
    model is timed by itself and closed before the next.
    """
    costs: dict[str, dict[str, Any]] = {name: {"timed": {}} for name in contenders if _is_timed(name)}
    for one in contenders.values():
        for task in one.tasks:
            _answer(one, task, records[task], rows[task], params, store)
        if params.engine == "vllm" and one.has_weights:
            if _is_timed(one.name):
                _time({one.name: one}, records, rows, params, costs)
            one.engine.close()
    if params.engine != "vllm":
        _time({name: contenders[name] for name in costs}, records, rows, params, costs)
    elif not contenders["teacher"].has_weights:
        _time({"teacher": contenders["teacher"]}, records, rows, params, costs)
    return costs


def _is_timed(name: str) -> bool:
    """Tell whether a model is timed: one on its way costs what the student does that comes of it."""
    return not name.endswith(("_before", "_words"))


def _answer(
    one: Contender,
    task: Task,
    records: Sequence[Record],
    rows: Sequence[dict[str, Any]],
    params: MeasureParams,
    store: AnswerStore,
) -> None:
    """Add a model's answers to the rows of a task."""
    prompts = [one.prompt(task, record) for record in records]
    answers = _ask(one.engine, prompts, Sampling(params.max_new_tokens), store, f"measure {one.name}, {task}")
    for row, answer in zip(rows, answers, strict=True):
        row[one.name] = _kept(answer)


def _ask(
    engine: Engine, prompts: list[str], sampling: Sampling, store: AnswerStore, title: str
) -> list[Answer]:
    fill_store(engine, lambda: prompts, sampling, store, total=len(prompts), label=title)
    return list(read_answers(engine, prompts, sampling, store))


def _kept(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "tokens": answer.tokens,
        "cut": answer.finish_reason == "length",
        "refused": answer.finish_reason == "refused",  # too long for the model: it counts as failed
    }


def _time(
    contenders: Mapping[str, Contender],
    records: Mapping[Task, Sequence[Record]],
    rows: Rows,
    params: MeasureParams,
    costs: Mapping[str, dict[str, Any]],
) -> None:
    """Time models on the prompts that all of their task could read: a refusal takes no time."""
    for task in rows:
        those = {name: one for name, one in contenders.items() if task in one.tasks}
        asked = [name for name in rows[task][0] if isinstance(rows[task][0][name], dict)]
        fit = [
            record
            for record, row in zip(records[task], rows[task], strict=True)
            if not any(row[name]["refused"] for name in asked)
        ]
        if not fit or not those:
            continue
        most = max(params.timed_prompts, params.load_prompts)
        timed = {
            name: Timed(one.engine, [one.prompt(task, record) for record in fit[:most]])
            for name, one in those.items()
        }
        for name, found in time_answers(timed, params).items():
            costs[name]["timed"][task] = found


def _teacher_again(
    teacher: Contender,
    records: Sequence[Record],
    rows: Sequence[dict[str, Any]],
    params: MeasureParams,
    label: LabelParams,
    store: AnswerStore,
) -> None:
    """Add a second answer of the teacher's, drawn with another seed: as near as a student can be."""
    temperature, top_p = (label.temperature, label.top_p) if label.temperature else (AGAIN_TEMPERATURE, 1.0)
    sampling = Sampling(params.max_new_tokens, temperature, top_p, label.seed + 1)
    prompts = [teacher.prompt("instructions", record) for record in records]
    if params.engine == "vllm" and teacher.has_weights:
        return  # vLLM has let go of the device
    answers = _ask(teacher.engine, prompts, sampling, store, "measure teacher again, instructions")
    for row, answer in zip(rows, answers, strict=True):
        row["teacher_again"] = _kept(answer)


def _add_fidelity(
    contenders: Mapping[str, Contender], records: Sequence[Record], rows: Sequence[dict[str, Any]]
) -> None:
    """Add to the rows how near System 1 is to its teacher, and the floor and ceiling of that.

    `forced`: how each model predicts the teacher's answers. `free`: how likely the teacher finds answers; of
    System 1's and of the teacher's second ones, and, as a floor, of System 1's under other prompts. Without
    the teacher's weights there is neither.
    """
    teacher = contenders["teacher"]
    if not teacher.has_weights:
        print(
            "measure: no fidelity, since the teacher is a server's and tells no probabilities",
            file=sys.stderr,
        )
        return
    prompts = [teacher.prompt("instructions", record) for record in records]
    if shared := _shared_vocabulary(contenders):
        found = forced_agreement(
            Reading(teacher.model, teacher.tokenizer, prompts, [row["reference"] for row in rows]),
            dict(_forced_readings(contenders, records, rows)),
            shared,
        )
        for row, values in zip(rows, found, strict=True):
            row["forced"] = values
    else:
        print("measure: no agreement by tokens, since the tokenizers differ", file=sys.stderr)
    elsewhere = [*rows[1:], *rows[:1]]
    for who, of, texts in (
        ("teacher", "teacher", rows),
        ("teacher_again", "teacher_again", rows),
        ("system1", "system1", rows),
        ("system1_other_prompt", "system1", elsewhere),
    ):
        if of not in rows[0]:
            continue
        answers = [row[of] for row in texts]
        reading = Reading(
            teacher.model,
            teacher.tokenizer,
            prompts,
            [answer["text"] for answer in answers],
            [not answer["cut"] for answer in answers],
        )
        for row, nats in zip(rows, answer_nats(reading), strict=True):
            row.setdefault("free", {})[who] = nats


def _forced_readings(
    contenders: Mapping[str, Contender], records: Sequence[Record], rows: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, Reading]]:
    """Yield who reads the teacher's answers beside the teacher.

    The ceiling is the teacher asked as the student is; the floor the student asked something else.
    """
    teacher, student, before = (contenders[name] for name in ("teacher", "system1", "system1_before"))
    references = [row["reference"] for row in rows]
    as_student = [format_prompt(r["instruction"], r["input"], "system1") for r in records]
    spaced = [format_response(reference) for reference in references]
    yield "teacher_as_student", Reading(teacher.model, teacher.tokenizer, as_student, spaced)
    yield "system1", Reading(student.model, student.tokenizer, as_student, spaced)
    if words := contenders.get("system1_words"):
        yield words.name, Reading(words.model, words.tokenizer, as_student, spaced)
    other = as_student[1:] + as_student[:1]
    yield "system1_other_prompt", Reading(student.model, student.tokenizer, other, spaced)
    own = [before.prompt("instructions", record) for record in records]
    yield "system1_before", Reading(before.model, before.tokenizer, own, references)


def _shared_vocabulary(contenders: Mapping[str, Contender]) -> int:
    """Return how many tokens teacher, System 1 and System 1 before share; 0 where their tokenizers differ."""
    ones = [contenders[name] for name in ("teacher", "system1", "system1_before")]
    if len({tokenizer_digest(one.tokenizer) for one in ones}) > 1:
        return 0
    return min(len(ones[0].tokenizer), *(one.model.get_output_embeddings().weight.shape[0] for one in ones))


def _described(one: Contender) -> dict[str, Any]:
    """Return what a model is, where it can be known."""
    found = {
        "model": one.candidate.model,
        "weights": one.engine.identity.get("weights", one.candidate.base_url),
        "quantization": one.candidate.quantization,
        "engine": one.engine.identity["engine"],
    }
    return found | (size_of(one.model, one.candidate.model) if one.has_weights else {})


def _open_judge(params: MeasureParams, label: LabelParams) -> AbstractContextManager[Engine | None]:
    """Return the judge's engine, which loads no weights yet, in this process or at a server; or none.

    Raises:
        ValueError: it cannot be had, said in the names of `measure`.
    """
    if params.judge is None:
        return nullcontext()
    # Labelling may be spread over workers, this is not
    alone = label.model_copy(update={"engine_workers": 1, "ray_address": None})
    where = (params.judge_revision, params.judge_engine, params.judge_base_url)
    return closing(open_judge("measure", params.judge, *where, alone))


def _judge(judge: Engine, rows: Sequence[dict[str, Any]], store: AnswerStore, params: MeasureParams) -> None:
    """Add to System 1's answers how they did against the teacher's and against those before distillation."""
    opponents = {"teacher": "teacher", "before": "system1_before"}
    pairs = [
        Pair(row["prompt"], row[who]["text"], row["system1"]["text"])
        for who in opponents.values()
        for row in rows
    ]
    title = f"measure system1, judged by {judge.teacher}"
    outcomes = iter(judge_pairs(judge, pairs, store, params.judge_max_new_tokens, title))
    for opponent in opponents:
        for row in rows:
            row["system1"].setdefault("judged", {})[opponent] = list(next(outcomes))
