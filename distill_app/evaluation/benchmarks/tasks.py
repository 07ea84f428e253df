"""Finding and loading tasks: of lm-evaluation-harness, or of a folder of one's own.

A task file is a YAML of the harness; one that reads local questions needs no network:
data/tasks/everyday/everyday.yaml is an example.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from distill_app.evaluation.benchmarks.params import TaskParams

Task = Any  # lm_eval.api.task.Task; not imported here, so that this module stays light
Group = Any  # lm_eval.api.group.Group

# Blind choice is right one time in as many as there are
CHOICE_METRICS = ("acc", "acc_norm", "acc_bytes")


@dataclass(frozen=True)
class Benchmark:
    """What is reported under one name: a task, or a group that has a score of its own."""

    name: str
    metric: str  # that decides: the one of the settings, else the first that the task file or group lists
    tasks: list[Task]  # the group's, or the one task
    settings: TaskParams
    group: Group | None = None
    higher_is_better: bool = True
    chance: float | None = None  # the expected score of blind choices; None where that is not known


def load_benchmarks(wanted: Sequence[TaskParams], task_dir: str) -> list[Benchmark]:
    """Return the benchmarks of these names, their questions read and looked through.

    A tag, and a group without a score of its own, stand for their tasks.

    Raises:
        FileNotFoundError: there is no such folder.
        ImportError: a task needs a package that is not installed.
        OSError: a task's questions cannot be had from the Hub.
        ValueError: there is no such task, or a task file or its questions are malformed; one line.
    """
    _check_task_files(Path(task_dir))
    names = [one.task for one in wanted]
    manager = _task_manager(names, task_dir)
    found: dict[str, Benchmark] = {}
    for settings in wanted:
        name = settings.task
        if name not in manager.task_index:
            raise ValueError(_unknown_task(name, task_dir, manager.all_tasks))
        try:
            found |= {item.name: item for item in _load(settings, manager)}
        except Exception as err:  # the harness, datasets, Jinja, a task's own Python: each has its own errors
            raise _told(name, manager.task_index[name].yaml_path, task_dir, err) from err
    return list(found.values())


def _check_task_files(task_dir: Path) -> None:
    """The harness passes over a file that it cannot read, and over the second of two tasks of one name."""
    if not task_dir.is_dir():
        raise FileNotFoundError(f"benchmark.task_dir: {task_dir}: no such folder; mend the path or make it")
    seen: dict[str, Path] = {}
    for path in sorted(task_dir.glob("**/*.yaml")):
        try:
            node = yaml.compose(path.read_text(encoding="utf-8"))  # no values: their tags are the harness's
        except (yaml.YAMLError, UnicodeDecodeError) as err:
            raise ValueError(f"{path}: not YAML ({' '.join(str(err).split())}); mend it") from err
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{path}: found no keys, expected a task file (task, dataset_path, ...)")
        names = [value.value for key, value in node.value if key.value == "task" and value.id == "scalar"]
        for name in names:
            if name in seen:
                raise ValueError(f"{path}: task {name} is that of {seen[name]} too; rename one of them")
            seen[name] = path


def _task_manager(names: Sequence[str], task_dir: str) -> Any:
    """Return lm-eval's index of tasks: the folder's alone if it has them all, for the whole takes long."""
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=task_dir, include_defaults=False)
    return own if set(names) <= set(own.all_subtasks) else TaskManager(include_path=task_dir)


def _unknown_task(name: str, task_dir: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists those of the harness"
    return f"benchmark.tasks: {name}: no such task in {task_dir} or lm-evaluation-harness; {hint}"


def _load(settings: TaskParams, manager: Any) -> Iterator[Benchmark]:
    loaded, limit = manager.load([settings.task]), settings.limit
    for task in loaded["tasks"].values():
        _check_task(task, limit)
        _set_up(task, settings)
    scored = {key: group for key, group in loaded["groups"].items() if group.has_aggregation}
    inner = {sub.name for group in scored.values() for sub in group.get_all_groups()}
    in_groups: set[str] = set()
    for key, group in scored.items():
        if key not in inner:
            tasks = group.get_all_tasks()
            in_groups |= {task.task_name for task in tasks}
            metric = settings.metric or group.aggregate_metric_list[0].metric
            yield Benchmark(key, metric, tasks, settings, group, _rises(tasks[0], metric))
    for key, task in loaded["tasks"].items():
        if key not in in_groups:
            metric = settings.metric or next(iter(task.aggregation()))
            chance, rises = _chance(task, metric, limit), _rises(task, metric)
            yield Benchmark(key, metric, [task], settings, higher_is_better=rises, chance=chance)


def _set_up(task: Task, settings: TaskParams) -> None:
    """Give a task its number of solved examples and its room; one that wants no examples keeps it so."""
    if settings.num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config("num_fewshot", settings.num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    if settings.max_gen_toks is not None and task.OUTPUT_TYPE == "generate_until":
        task.set_config("generation_kwargs", {"max_gen_toks": settings.max_gen_toks}, update=True)


def _rises(task: Task, metric: str) -> bool:
    """Tell whether more of a metric is better, as the task says; where it says nothing it is."""
    return bool(task.higher_is_better().get(metric, True))


def _told(name: str, yaml_path: Path | None, task_dir: str, err: Exception) -> Exception:
    """Return the error in one line, with what to do about it."""
    root: BaseException = err
    while root.__cause__ is not None:
        root = root.__cause__
    reason = _reason(root)
    if isinstance(err, ImportError) or isinstance(root, (ImportError, AssertionError)):
        instead = "; math500 is the same test without it" if "minerva_math500" in name else ""
        return ImportError(f"benchmark.tasks: {name}: {reason}; install what it needs{instead}")
    if isinstance(root, OSError) and root.errno is not None and not isinstance(err, ConnectionError):
        return OSError(f"benchmark.tasks: {name}: {reason}; check the disk and HF_HOME")
    is_own = yaml_path is not None and yaml_path.is_relative_to(task_dir)
    if is_own and not isinstance(err, ConnectionError):
        return ValueError(f"{yaml_path}: cannot be loaded ({reason}); mend it or the questions that it names")
    return OSError(
        f"benchmark.tasks: {name}: cannot be had ({reason}); check the network (and HF_HUB_OFFLINE), set"
        f" HF_TOKEN if it is gated, or take a task whose questions are in {task_dir}"
    )


def _reason(err: BaseException) -> str:
    text = " ".join(str(err).split())
    return text if type(err) is ValueError else f"{type(err).__name__}: {text}"


def _check_task(task: Task, limit: int | None) -> None:
    """Raise ValueError for a task that is not run here, and over a question that the harness would fail at
    after hours, or count as wrong."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise ValueError("it runs code that a model wrote, or shows pictures; such tasks are not run here")
    for number, doc in enumerate(_questions(task, limit)):
        try:
            _check_question(task, doc)
        except Exception as err:  # Jinja's, or whatever a task's own Python raises
            raise ValueError(f"question {number}: {_reason(err)}") from None


def _check_question(task: Task, doc: Any) -> None:
    task.doc_to_text(doc)
    answer = task.doc_to_target(doc)
    if not _has_choices(task):
        return
    choices = task.doc_to_choice(doc)
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError(f"choices {choices!r}, expected texts")
    if isinstance(answer, str) and answer not in choices:
        raise ValueError(f"answer {answer!r} is none of its {len(choices)} choices")
    if isinstance(answer, int) and answer not in range(len(choices)):
        raise ValueError(f"answer {answer} is none of its {len(choices)} choices, counted from 0")


def _chance(task: Task, metric: str, limit: int | None) -> float | None:
    """Return the mean of 1 / choices, where a question has one right answer among choices."""
    if not _has_choices(task) or task.multiple_target or metric not in CHOICE_METRICS:
        return None
    shares = [1 / len(task.doc_to_choice(doc)) for doc in _questions(task, limit)]
    return round(sum(shares) / len(shares), 6)


def _has_choices(task: Task) -> bool:
    """Tell whether a question has choices to answer with; in some tasks the choice is between questions."""
    return task.OUTPUT_TYPE == "multiple_choice" and not getattr(task, "multiple_input", True)


def _questions(task: Task, limit: int | None) -> Iterator[Any]:
    return itertools.islice(task.eval_docs, limit)
