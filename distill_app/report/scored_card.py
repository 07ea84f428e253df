"""A student's card with what the comparison found: in words, in a table, and in the Hub's metadata."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distill_app.evaluation.measures import NOTHING, UNKNOWN, show_both
from distill_app.evaluation.names import STUDENTS
from distill_app.report.cards.card import interval_name, own_card
from distill_app.report.markdown import escaped, table
from distill_app.report.tables import benchmark_style, figure_of, models_of, shown_of


def card_with_scores(model_dir: str, comparison: Mapping[str, Any]) -> str:
    """Return a student's card with what the comparison found.

    It is the card that training wrote and more; a folder without one gets what can be said of it.

    Args:
        model_dir: a checkpoint whose name is that of a student, "system1" or "system2".
        comparison: what comparison.json holds.

    Raises:
        ValueError: the comparison has no verdict on that model.
    """
    from huggingface_hub import ModelCard

    folder = Path(model_dir)
    name = folder.name
    if name not in comparison["students"]:
        found = ", ".join(comparison["students"]) or "none"
        raise ValueError(f"{model_dir}: the comparison has no verdict on {name}, only on {found}; compare it")
    card = ModelCard(own_card(folder))
    data: Any = card.data
    data.model_name = name
    data.eval_results = [*(data.eval_results or []), *_results(name, comparison)]
    card.text = "\n".join([card.text.rstrip("\n"), "", *_found(name, comparison)])
    return str(card).rstrip("\n") + "\n"


def _sentences(verdict: Mapping[str, Any]) -> list[str]:
    more = [verdict[part]["sentence"] for part in ("gain", "closed") if verdict[part]]
    return [
        verdict["headline"],
        *(check["sentence"] for check in verdict["checks"]),
        *more,
        *verdict["notes"],
    ]


def _found(name: str, comparison: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the card's part on the comparison."""
    asked = f"{comparison['prompts'][STUDENTS[name].task]} held-out {STUDENTS[name].prompts_name}"
    called = {f"{name}_before": "before distillation", f"{name}_words": "on words alone", name: "this model"}
    models = [called.get(who, who) for who in models_of(name, comparison)]
    yield "## Compared with its teacher"
    yield from (f"- {escaped(sentence)}" for sentence in _sentences(comparison["students"][name]))
    yield ""
    yield from table([f"on {asked}", *models], _rows(name, comparison))
    yield "\nIn brackets: 95% intervals."
    if comparison["benchmarks"]:
        yield ""
        yield from table(["benchmark (questions)", *models], _benchmark_rows(name, comparison))


def _rows(name: str, comparison: Mapping[str, Any]) -> Iterator[list[str]]:
    for group in (STUDENTS[name].task, "size"):
        for measure in shown_of(comparison, group):
            figures = [figure_of(comparison, who, group, measure.key) for who in models_of(name, comparison)]
            cells = [show_both(measure.style, figure) for figure in figures]
            if any(cell != NOTHING for cell in cells):
                yield [measure.name, *cells]


def _results(name: str, comparison: Mapping[str, Any]) -> Iterable[Any]:
    """Yield the metadata's scores of a student on its own task, and on the benchmarks."""
    from huggingface_hub import EvalResult

    task = STUDENTS[name].task
    for measure in shown_of(comparison, task):
        figure = figure_of(comparison, name, task, measure.key)
        if not measure.decides or figure["value"] is None:
            continue
        yield EvalResult(
            task_type="text-generation",
            dataset_type="json",
            dataset_name=f"{comparison['prompts'][task]} held-out prompts ({task})",
            dataset_split="test",
            metric_type=measure.key,
            metric_name=f"{measure.name}{interval_name(figure, '%.4g')}",
            metric_value=round(figure["value"], 4),
        )
    for benchmark, found in comparison["benchmarks"].items():
        figure = found["models"].get(name, UNKNOWN)
        if figure["value"] is not None:
            yield EvalResult(
                task_type="text-generation",
                dataset_type=benchmark,
                dataset_name=f"{benchmark}, {found['questions']} questions",
                metric_type=found["metric"],
                metric_name=f"{found['metric']}{interval_name(figure, '%.4g')}",
                metric_value=round(figure["value"], 4),
            )


def _benchmark_rows(name: str, comparison: Mapping[str, Any]) -> Iterator[list[str]]:
    for benchmark, found in comparison["benchmarks"].items():
        style = benchmark_style(found)
        figures = [found["models"].get(who) or UNKNOWN for who in models_of(name, comparison)]
        title = escaped(f"{benchmark}, {found['metric']} ({found['questions']})")
        yield [title, *(show_both(style, figure) for figure in figures)]
