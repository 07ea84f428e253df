"""Every form of a comparison: for people the page, Markdown and cards, for DVC a few numbers."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_app.core.files import read_json, save_json, save_text
from distill_app.evaluation.measures import TASKS, is_known, measures_of
from distill_app.evaluation.names import MODELS, STUDENTS
from distill_app.evaluation.students import student_folder
from distill_app.report.markdown import render_markdown
from distill_app.report.page import render_page
from distill_app.report.scored_card import card_with_scores
from distill_app.report.tables import figure_of

Rows = Sequence[Mapping[str, Any]]


def write_report(
    comparison: Mapping[str, Any],
    answers: Mapping[str, Rows],
    params: Mapping[str, Any],
    models_dir: str,
    metrics_dir: str,
    reports_dir: str,
) -> None:
    """Write comparison.json, .html and .md, scores.json and .csv, and a card for each student.

    Args:
        comparison, answers: as `compare_models` returns them.
        params: every section of params.yaml, for the page's account of its origin.

    Raises:
        FileNotFoundError, ValueError: a student's folder or a curve is missing or malformed.
    """
    reports, models = Path(reports_dir), Path(models_dir)
    origin = {
        "models": {name: _about(found) for name, found in comparison["models"].items()},
        **{name: _provenance(student_folder(models, name)) for name in STUDENTS},
        "params": dict(params),
    }
    curves = {name: _curves(Path(metrics_dir), f"train_s{name[-1]}") for name in STUDENTS}
    save_json(reports / "comparison.json", comparison)
    save_json(reports / "scores.json", key_figures(comparison))
    save_text(reports / "scores.csv", _scores_csv(comparison))
    save_text(reports / "comparison.md", render_markdown(comparison))
    save_text(reports / "comparison.html", render_page(comparison, answers, curves, origin))
    for name in STUDENTS:
        save_text(
            reports / "cards" / f"{name}.md", card_with_scores(str(student_folder(models, name)), comparison)
        )


def _about(model: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if not isinstance(value, Mapping)}


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


def key_figures(comparison: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return what `dvc metrics` shows: of each student what decides, and what distillation gained."""
    found: dict[str, dict[str, float | None]] = {}
    for name, verdict in comparison["students"].items():
        found[name] = {check["key"]: _short(check["found"]["value"]) for check in verdict["checks"]}
        gain = verdict["gain"]
        if gain:
            found[name] |= {gain["measure"]: _short(gain["after"]["value"])}
            found[name] |= {"gain": _short(gain["change"]["value"])}
    return found


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _scores_csv(comparison: Mapping[str, Any]) -> str:
    """Return one row a bar for `dvc plots`, whose template adds up bars of one name: each has its own."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["percent", "score"])
    table.writerows(_bars(comparison))
    return text.getvalue()


def _bars(comparison: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
    """Yield the deciding measures that are shares, in percent, so that bars compare."""
    for task in TASKS:
        for measure in measures_of(task):
            if not measure.decides or measure.style != "percent":
                continue
            for name, title in MODELS.items():
                value = figure_of(comparison, name, task, measure.key)["value"]
                if value is not None and is_known(value):
                    yield round(100 * value, 2), f"{measure.name}: {title}"
