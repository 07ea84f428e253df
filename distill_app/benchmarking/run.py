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

from distill_app.benchmarking.params import BenchmarkParams
from distill_app.benchmarking.scores import score_figure
from distill_app.benchmarking.tasks import Benchmark, Task, load_benchmarks
from distill_app.core.models import check_local, load_teacher, load_tokenizer
from distill_app.core.prompts import ASSISTANT
from distill_app.core.statistics import Figure
from distill_app.labeling.candidates import Candidate, five_models
from distill_app.labeling.params import LabelParams

BOOTSTRAP_ITERS = 1000  # for the few metrics whose standard error lm-eval draws
REPORT_EVERY_SEC = 15.0
MODEL_FILES = (".safetensors", ".json", ".jinja", ".model")  # not cards and curves
SEED = 17  # of few-shot examples and of tasks that sample


@dataclass(frozen=True)
class Score:
    """What one model got in one benchmark."""

    metric: str  # with the filter through which it was read, where there is one
    questions: int
    figure: Figure


def run_benchmarks(
    params: BenchmarkParams,
    label: LabelParams,
    teacher: str | None,
    system1_before: str,
    system2_before: str,
    models_dir: str,
    log_path: str,
) -> dict[str, Any]:
    """Return each benchmark's metric, number of questions, chance level and five figures; {} for no tasks.

    Models of the same bytes are asked once. What lm-eval itself has to say goes to the log.

    Args:
        teacher: Hub id or folder of the teacher's weights; None takes label.teacher.

    Raises:
        FileNotFoundError, ImportError, OSError, ValueError: a task or model is not there, cannot be had or
            is malformed; told before any model is asked.
    """
    if not params.tasks:
        return {}
    models = five_models(label, teacher, system1_before, system2_before, models_dir)
    for model in models:
        _check_model(model, params.apply_chat_template)
    stderr = sys.stderr
    with _noise_to(log_path):
        benchmarks = load_benchmarks(params.tasks, params.task_dir, params.limit)
        _set_fewshot(benchmarks, params.num_fewshot)
        return _results(models, benchmarks, params, stderr)


def _check_model(model: Candidate, needs_chat_template: bool) -> None:
    check_local(model.model)
    if needs_chat_template and not load_tokenizer(model.model, model.revision).chat_template:
        raise ValueError(f"{model.model}: no chat template in it; set benchmark.apply_chat_template to false")


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


def _set_fewshot(benchmarks: Sequence[Benchmark], num_fewshot: int | None) -> None:
    """Set the number of solved examples as the harness does: a task that says 0 keeps it."""
    for task in _tasks(benchmarks):
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)


def _results(
    models: Sequence[Candidate], benchmarks: Sequence[Benchmark], params: BenchmarkParams, stderr: TextIO
) -> dict[str, Any]:
    results: dict[str, Any] = {
        item.name: {"metric": item.metric, "questions": 0, "chance": item.chance, "models": {}}
        for item in benchmarks
    }
    asked: dict[Any, tuple[str, dict[str, Score]]] = {}
    for model in models:
        name, key = model.name, _identity(model)
        if key not in asked:
            answers = _ask(model, benchmarks, params, stderr)
            asked[key] = name, {item.name: _score(item, answers) for item in benchmarks}
        first, scores = asked[key]
        for task, score in scores.items():
            results[task] |= {"metric": score.metric, "questions": score.questions}
            results[task]["models"][name] = score.figure
        told = ", ".join(f"{task} {_shown(score)}" for task, score in scores.items())
        same = "" if first == name else f" (the same weights as {first})"
        print(f"benchmark: {name}: {told}{same}", file=stderr, flush=True)
    return results


def _identity(model: Candidate) -> tuple[Any, ...]:
    """Return what makes a model the same as another here: how it is loaded, and its files' bytes."""
    folder = Path(model.model)
    if not folder.is_dir():
        return model.model, model.revision, model.quantization
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
    from lm_eval import evaluate
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
    for task in tasks:
        task.set_fewshot_seed(SEED)
    try:
        # simple_evaluate would ask the machine for its hardware and packages after each model, for seconds
        return evaluate(
            lm=lm,
            task_dict={
                "tasks": {task.task_name: task for task in tasks},
                "groups": {item.name: item.group for item in benchmarks if item.group},
            },
            limit=params.limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            apply_chat_template=params.apply_chat_template,
            fewshot_as_multiturn=params.apply_chat_template,
        )
    finally:
        del lm, model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _tasks(benchmarks: Sequence[Benchmark]) -> list[Task]:
    """Return the tasks of all benchmarks, one that is in two of them once."""
    return list({task.task_name: task for item in benchmarks for task in item.tasks}.values())


def _score(item: Benchmark, answers: Mapping[str, Any]) -> Score:
    found = answers["results"][item.name]
    keys = [key for key in found if key.partition(",")[0] == item.metric]
    if not keys:
        known = ", ".join(key for key in found if "," in key and "_stderr" not in key)
        raise ValueError(
            f"benchmark.tasks: {item.name}: no {item.metric} came out of it, but {known or 'nothing'}"
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
    return Score(metric, questions, score_figure(found[keys[0]], stderr, scores))


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
