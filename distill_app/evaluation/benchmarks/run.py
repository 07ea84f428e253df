"""Running the benchmarks: each model is loaded once, asked all tasks and freed before the next."""

import contextlib
import gc
import hashlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from distill_app.core.models import check_local, load_teacher, load_tokenizer
from distill_app.core.prompts import ASSISTANT
from distill_app.evaluation.benchmarks.params import BenchmarkParams
from distill_app.evaluation.benchmarks.scores import is_number, score_figure
from distill_app.evaluation.benchmarks.tasks import Benchmark, Task, load_benchmarks
from distill_app.evaluation.candidates import Candidate, TeacherParams, compared_models
from distill_app.evaluation.statistics import Figure
from distill_app.generation.engines import open_engine
from distill_app.labeling.params import LabelParams
from distill_app.labeling.store import AnswerStore

BOOTSTRAP_ITERS = 1000  # for the few metrics whose standard error lm-eval draws
REPORT_EVERY_SEC = 15.0
MODEL_FILES = (".safetensors", ".json", ".jinja", ".model")  # not cards and curves
SEED = 17  # of few-shot examples and of tasks that sample


@dataclass(frozen=True)
class Score:
    """What one model got in one benchmark."""

    metric: str  # with the filter through which it was read, where there is one
    filter: str
    questions: int
    figure: Figure
    scores: list[float] | None  # of each question, in order; None where the metric has none a question
    all_metrics: dict[str, dict[str, float | None]]  # each with its filter: value and standard error


def run_benchmarks(
    params: BenchmarkParams,
    label: LabelParams,
    teacher: TeacherParams,
    system1_before: str,
    system2_before: str,
    models_dir: str,
    log_path: str,
    system1_revision: str | None = None,
    system2_revision: str | None = None,
) -> dict[str, Any]:
    """Return each benchmark's metric, number of questions, chance level and five figures; {} for no tasks.

    Models of the same bytes are asked once. What lm-eval itself has to say goes to the log.

    Args:
        teacher: with which teacher the students are compared.

    Raises:
        FileNotFoundError, ImportError, OSError, ValueError: a task or model is not there, cannot be had or
            is malformed; told before any model is asked.
    """
    if not params.tasks:
        return {}
    before = (system1_before, system2_before, models_dir, system1_revision, system2_revision)
    models = compared_models(label, teacher, *before)
    wanted = params.settings()
    for model in models:
        if model.base_url is None:
            _check_model(model, any(one.apply_chat_template for one in wanted))
    stderr = sys.stderr
    with _noise_to(log_path):
        benchmarks = load_benchmarks(wanted, params.task_dir)
        return _results(models, benchmarks, params, label, stderr)


def _check_model(model: Candidate, needs_chat_template: bool) -> None:
    check_local(model.model)
    if needs_chat_template and not load_tokenizer(model.model, model.revision).chat_template:
        raise ValueError(f"{model.model}: no chat template in it; set apply_chat_template to false")


@contextlib.contextmanager
def _noise_to(log_path: str) -> Iterator[None]:
    """Send what lm-eval and datasets print, warn and draw to a file: bars and hints, on both streams."""
    Path(log_path).parent.mkdir(parents=True, exist_ok=True)
    with (
        Path(log_path).open("w", encoding="utf-8") as log,
        contextlib.redirect_stderr(log),
        contextlib.redirect_stdout(log),
    ):
        yield


def _results(
    models: Sequence[Candidate],
    benchmarks: Sequence[Benchmark],
    params: BenchmarkParams,
    label: LabelParams,
    stderr: TextIO,
) -> dict[str, Any]:
    results: dict[str, Any] = {
        item.name: {
            "metric": item.metric,
            "filter": "",
            "questions": 0,
            "chance": item.chance,
            "higher_is_better": item.higher_is_better,
            "settings": _said(item),
            "all_metrics": {},
            "models": {},
            "scores": {},
        }
        for item in benchmarks
    }
    asked: dict[Any, tuple[str, dict[str, Score]]] = {}
    for model in models:
        name, key = model.name, _identity(model)
        if key not in asked:
            if model.base_url is not None:
                found = _ask_server(model, benchmarks, label, stderr)
            else:
                answers = _ask(model, benchmarks, params, stderr)
                found = {item.name: _score(item, answers) for item in benchmarks}
            asked[key] = name, found
        first, scores = asked[key]
        for task, score in scores.items():
            results[task] |= {"metric": score.metric, "filter": score.filter, "questions": score.questions}
            results[task]["models"][name] = score.figure
            results[task]["scores"][name] = score.scores
            results[task]["all_metrics"][name] = score.all_metrics
        told = ", ".join(f"{task} {_shown(score)}" for task, score in scores.items()) or "nothing asked"
        same = "" if first == name else f" (the same weights as {first})"
        print(f"benchmark: {name}: {told}{same}", file=stderr, flush=True)
    return results


def _said(item: Benchmark) -> dict[str, Any]:
    """Return the settings with which a benchmark is run, those that its tasks decided among them."""
    task = item.tasks[0]
    said = {key: value for key, value in item.settings.model_dump().items() if key not in ("task", "metric")}
    said["num_fewshot"] = task.get_config("num_fewshot")
    if task.OUTPUT_TYPE == "generate_until":
        said["max_gen_toks"] = (task.get_config("generation_kwargs") or {}).get("max_gen_toks")
    return said


def _identity(model: Candidate) -> tuple[Any, ...]:
    """Return what makes a model the same as another here: how it is loaded, and its files' bytes."""
    folder = Path(model.model)
    if model.base_url is not None or not folder.is_dir():
        return model.model, model.revision, model.quantization, model.base_url
    digests: list[Any] = [model.quantization]
    for path in sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES):
        with path.open("rb") as file:
            digests.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    return tuple(digests)


def _ask(
    candidate: Candidate, benchmarks: Sequence[Benchmark], params: BenchmarkParams, stderr: TextIO
) -> dict[str, Any]:
    """Return lm-eval's results of one model, each question's scores among them."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import set_seed

    class Asked(HFLM):
        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            """With chat templates lm-eval puts no space before a choice; after our own prompt one belongs."""
            if context.endswith(ASSISTANT) and not continuation[:1].isspace():
                continuation = f" {continuation}"
            return super()._encode_pair(context, continuation)

    model, tokenizer = load_teacher(candidate.model, candidate.quantization, candidate.revision)
    tasks = _tasks(benchmarks)
    # In bfloat16 the logarithms of probabilities would be 0.03 apart and choices would tie
    lm = Asked(model, tokenizer=tokenizer, batch_size=params.batch_size, softmax_dtype=torch.float32)
    lm.set_cache_hook(_Counter(candidate.name, tasks, stderr))
    set_seed(SEED)
    try:
        return _asked_all(lm, benchmarks)
    finally:
        del lm, model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _ask_server(
    candidate: Candidate, benchmarks: Sequence[Benchmark], label: LabelParams, stderr: TextIO
) -> dict[str, Score]:
    """Return the scores of a model behind a server, of the benchmarks whose answers it writes itself."""
    from distill_app.evaluation.benchmarks.hosted import Hosted, answerable

    written = answerable(benchmarks)
    if left_out := [item.name for item in benchmarks if item not in written]:
        print(
            f"benchmark: {candidate.name}: {', '.join(left_out)} left out: they ask how likely given texts"
            " are, which a server's chat does not tell",
            file=stderr,
            flush=True,
        )
    if not written:
        return {}
    with contextlib.closing(open_engine(label)) as engine, AnswerStore(label.store) as store:
        answers = _asked_all(Hosted(engine, store, stderr), written)
    return {item.name: _score(item, answers) for item in written}


def _asked_all(lm: Any, benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    for task in _tasks(benchmarks):
        task.set_fewshot_seed(SEED)
    answers: dict[str, Any] = {"results": {}, "samples": {}, "n-samples": {}}
    for same in _groups(benchmarks):
        found = _evaluated(lm, same)
        for key, part in answers.items():
            part.update(found[key])
    return answers


def _groups(benchmarks: Sequence[Benchmark]) -> list[list[Benchmark]]:
    """Return the benchmarks that the harness can run in one go: it takes these settings for all tasks."""
    groups: dict[Any, list[Benchmark]] = {}
    for item in benchmarks:
        groups.setdefault((item.settings.apply_chat_template, item.settings.limit), []).append(item)
    return list(groups.values())


def _evaluated(lm: Any, benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    """Run benchmarks of the same settings; the samples come in the order of the questions."""
    from lm_eval import evaluate

    settings = benchmarks[0].settings
    # simple_evaluate would ask the machine for its hardware and packages after each model, for seconds
    found = evaluate(
        lm=lm,
        task_dict={
            "tasks": {task.task_name: task for task in _tasks(benchmarks)},
            "groups": {item.name: item.group for item in benchmarks if item.group},
        },
        limit=settings.limit,
        bootstrap_iters=BOOTSTRAP_ITERS,
        apply_chat_template=bool(settings.apply_chat_template),
        fewshot_as_multiturn=bool(settings.apply_chat_template),
    )
    for samples in found["samples"].values():
        samples.sort(key=lambda sample: sample["doc_id"])
    return found


def _tasks(benchmarks: Sequence[Benchmark]) -> list[Task]:
    """Return the tasks of all benchmarks, one that is in two of them once."""
    return list({task.task_name: task for item in benchmarks for task in item.tasks}.values())


def _score(item: Benchmark, answers: Mapping[str, Any]) -> Score:
    found = answers["results"][item.name]
    wanted = item.settings.filter
    keys = [key for key in found if key.partition(",")[0] == item.metric]
    keys = [key for key in keys if wanted in (None, key.partition(",")[2])]
    if not keys:
        known = ", ".join(key for key in found if "," in key and "_stderr" not in key)
        named = f"{item.metric},{wanted}" if wanted else item.metric
        raise ValueError(
            f"benchmark.tasks: {item.name}: no {named} came out of it, but {known or 'nothing'};"
            " take one of these as its metric and filter"
        )
    through = keys[0].partition(",")[2]
    names = [task.task_name for task in item.tasks]
    scores = [
        sample[item.metric]
        for name in names
        for sample in answers["samples"][name]
        if sample["filter"] == through and item.metric in sample
    ]
    questions = sum(answers["n-samples"][name]["effective"] for name in names)
    metric = item.metric if through == "none" else keys[0]
    stderr = found[f"{item.metric}_stderr,{through}"]
    figure = score_figure(found[keys[0]], stderr, scores)
    by_question = [float(score) for score in scores] if all(map(is_number, scores)) else None
    return Score(metric, through, questions, figure, by_question, _all_metrics(found))


def _all_metrics(found: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return every metric through every filter, as the harness gives them."""
    kept = {}
    for key, value in found.items():
        metric, comma, through = key.partition(",")
        if comma and not metric.endswith("_stderr") and is_number(value):
            error = found.get(f"{metric}_stderr,{through}")
            stderr = float(error) if isinstance(error, (int, float)) else None
            kept[key] = {"value": float(value), "stderr": stderr}
    return kept


def _shown(score: Score) -> str:
    numbers = (f"{number:.3g}" if number is not None else "?" for number in score.figure.values())
    return "{} {} ({} to {})".format(score.metric, *numbers)


class _Counter:
    """lm-eval tells its cache of every answer as it comes; this one counts them and says how far it is."""

    def __init__(self, name: str, tasks: Sequence[Task], stderr: TextIO) -> None:
        self.name, self.tasks, self.stderr = name, tasks, stderr
        self.done = 0
        self._began = self._reported = time.monotonic()

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self._reported < REPORT_EVERY_SEC:
            return
        self._reported = now
        total = sum(len(task.instances) for task in self.tasks)
        left = (now - self._began) / self.done * max(total - self.done, 0)
        line = f"benchmark: {self.name}: {self.done} of {total} answers, about {left:.0f} s left"
        print(line, file=self.stderr, flush=True)
