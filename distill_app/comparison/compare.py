"""The comparison from start to end: figures, verdict, and the files that people and DVC read."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_app.cards.card import card_with_scores
from distill_app.comparison.figures import model_figures
from distill_app.comparison.markdown import render_markdown
from distill_app.comparison.names import MODELS, STUDENTS
from distill_app.comparison.params import CompareParams
from distill_app.comparison.report import render_report
from distill_app.comparison.verdict import below, judge_student
from distill_app.core.files import Record, iter_records, read_json, save_json, save_text
from distill_app.core.prompts import user_content
from distill_app.data.heldout import overlap

HELD_OUT = {"system1": "heldout_s1_labeled.json", "system2": "heldout_s2.json"}
TRAINED_ON = {"system1": "train_labeled.json", "system2": "omnithought_cot.json"}
PLOTTED = {"instructions": ("chrf", "loss"), "reasoning": ("accuracy", "multi_step")}


def compare_models(
    params: CompareParams,
    all_params: Mapping[str, Any],
    data_dir: str,
    models_dir: str,
    metrics_dir: str,
    reports_dir: str,
) -> dict[str, Any]:
    """Write the verdict to `reports_dir` in every form; return what comparison.json holds.

    No model is asked: everything is reckoned from answers.json, costs.json and benchmarks.json there.

    Args:
        all_params: every section of params.yaml, for the report's account of its origin.

    Raises:
        FileNotFoundError, ValueError: an input is missing or malformed.
    """
    reports, models = Path(reports_dir), Path(models_dir)
    answers, costs = read_json(reports / "answers.json"), read_json(reports / "costs.json")
    comparison = _compare(answers, costs, Path(data_dir), params)
    comparison["benchmarks"] = read_json(reports / "benchmarks.json")
    origin = {
        "models": {name: {"from": cost["model"], "weights": cost["weights"]} for name, cost in costs.items()},
        **{name: _provenance(models / name) for name in STUDENTS},
        "params": dict(all_params),
    }
    curves = {name: _curves(Path(metrics_dir), f"train_s{name[-1]}") for name in STUDENTS}
    save_json(reports / "comparison.json", comparison)
    save_json(reports / "scores.json", _key_figures(comparison))
    save_text(reports / "scores.csv", _score_rows(comparison))
    save_text(reports / "comparison.md", render_markdown(comparison))
    save_text(reports / "comparison.html", render_report(comparison, answers, curves, origin))
    for name in STUDENTS:
        save_text(reports / "cards" / f"{name}.md", card_with_scores(str(models / name), comparison))
    return comparison


def require_thresholds(comparison: Mapping[str, Any]) -> None:
    """Raise ValueError, in one line, if a figure of the comparison is below its threshold."""
    if faults := below(comparison["verdicts"]):
        raise ValueError(
            f"compare: {'; '.join(faults)}; see the report, or set compare.fail_below to false to go on"
        )


def _compare(
    answers: Mapping[str, Any], costs: Mapping[str, Any], data: Path, params: CompareParams
) -> dict[str, Any]:
    models = {name: model_figures(name, answers, costs[name]) for name in MODELS}
    shared = {}
    for name, student in STUDENTS.items():
        asked = _asked(data / HELD_OUT[name], [row["prompt"] for row in answers[student.task]])
        shared[name] = overlap(iter_records(data / TRAINED_ON[name]), asked)
    return {
        "prompts": {task: len(rows) for task, rows in answers.items()},
        "batch": len(costs["teacher"]["batch_sec"]),
        "models": models,
        "verdicts": {
            name: judge_student(name, models, answers[student.task], costs, shared[name], params)
            for name, student in STUDENTS.items()
        },
        "overlap": shared,
    }


def _asked(path: Path, prompts: Sequence[str]) -> list[Record]:
    """Return the held-out records whose prompts were asked."""
    by_prompt = {
        user_content(record["instruction"], record["input"]): record for record in iter_records(path)
    }
    if lost := [prompt for prompt in prompts if prompt not in by_prompt]:
        raise ValueError(
            f"{path}: {len(lost)} of {len(prompts)} prompts in answers.json are not in it, expected all; run"
            " measure again"
        )
    return [by_prompt[prompt] for prompt in prompts]


def _provenance(model: Path) -> Any:
    path = model / "provenance.json"
    return read_json(path) if path.is_file() else {}


def _curves(metrics: Path, stage: str) -> dict[str, list[dict[str, float]]]:
    return {
        "train": _read_curve(metrics / f"{stage}_loss.csv"),
        "validation": _read_curve(metrics / f"{stage}_validation.csv"),
    }


def _read_curve(path: Path) -> list[dict[str, float]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [{"step": int(r["step"]), "loss": float(r["loss"])} for r in csv.DictReader(file)]


def _key_figures(comparison: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return what `dvc metrics` shows: few figures, with names that read well in a table."""
    models, verdicts = comparison["models"], comparison["verdicts"]
    figures: dict[str, dict[str, float | None]] = {}
    for name, student in STUDENTS.items():
        now, before = (models[who][student.task] for who in (name, f"{name}_before"))
        measures = PLOTTED[student.task]
        found = {measure: now[measure]["value"] for measure in measures}
        found |= {f"{measures[0]}_before": before[measures[0]]["value"]}
        kept, speed = verdicts[name]["retention"]["value"], verdicts[name]["speedup"]["value"]
        figures[name] = {**found, "retention": kept, "speedup": speed}
    return {name: {key: _short(value) for key, value in found.items()} for name, found in figures.items()}


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _score_rows(comparison: Mapping[str, Any]) -> str:
    """Return one row a score, for `dvc plots`."""
    lines = ["score,model,value"]
    for task, measures in PLOTTED.items():
        for measure in measures:
            for name, found in comparison["models"].items():
                lines.append(f"{task} {measure},{name},{found[task][measure]['value']}")
    return "\n".join(lines) + "\n"
