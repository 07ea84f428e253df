"""The comparison from start to end: measure both systems, write scores, answers and the page."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_app.comparison.measure import ROLES, Compared, measure_system
from distill_app.comparison.params import CompareParams
from distill_app.comparison.report import render_report
from distill_app.core.files import Record, read_json, read_records, save_json, save_text
from distill_app.core.models import check_checkpoint
from distill_app.data.heldout import overlap
from distill_app.labeling.params import LabelParams

PLOTTED = {"system1": ("loss", "chrf"), "system2": ("accuracy", "multi_step")}


def compare_systems(
    params: CompareParams,
    teacher: LabelParams,
    system1_before: str,
    system2_before: str,
    data_dir: str,
    models_dir: str,
    metrics_dir: str,
    reports_dir: str,
) -> dict[str, Any]:
    """Write comparison.json, answers.json, scores.csv and comparison.html; return the scores.

    Raises:
        FileNotFoundError, ValueError: a model or held-out file is missing, empty or malformed.
    """
    teacher = _teacher_with_weights(params, teacher)
    data, models, reports = Path(data_dir), Path(models_dir), Path(reports_dir)
    train = {
        "system1": read_records(data / "train_labeled.json"),
        "system2": read_records(data / "omnithought_cot.json"),
    }
    heldout = {
        "system1": read_records(data / "heldout_s1_labeled.json")[: params.system1_prompts],
        "system2": read_records(data / "heldout_s2.json")[: params.system2_prompts],
    }
    before = {"system1": system1_before, "system2": system2_before}
    scores: dict[str, Any] = {}
    answers: dict[str, Any] = {}
    for mode in ("system1", "system2"):
        student = str(models / mode)
        check_checkpoint(student)
        compared = Compared(teacher.teacher, teacher.quantization, teacher.revision, before[mode], student)
        scores[mode], answers[mode] = measure_system(mode, compared, heldout[mode], params)
    losses = {mode: _read_curve(Path(metrics_dir) / f"train_s{mode[-1]}_loss.csv") for mode in scores}
    origin = _provenance(teacher, models, train, heldout)
    page = render_report(scores, answers, losses, origin)
    save_json(reports / "comparison.json", scores)
    save_json(reports / "answers.json", answers)
    save_text(reports / "scores.csv", _score_rows(scores))
    save_text(reports / "comparison.html", page)
    return scores


def _read_curve(path: Path) -> list[dict[str, float]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [{"step": int(r["step"]), "loss": float(r["loss"])} for r in csv.DictReader(file)]


def _score_rows(scores: dict[str, Any]) -> str:
    """Return one row a score, for `dvc plots`."""
    lines = ["score,model,value"]
    for mode, names in PLOTTED.items():
        for name in names:
            lines += [f"{mode} {name},{role},{scores[mode][role][name]}" for role in ROLES]
    return "\n".join(lines) + "\n"


def _teacher_with_weights(params: CompareParams, teacher: LabelParams) -> LabelParams:
    """Return the teacher to measure; a server's name for its model is nothing that can be loaded."""
    if params.teacher is not None:
        return teacher.model_copy(update={"teacher": params.teacher, "revision": None})
    if teacher.engine == "openai":
        raise ValueError(
            "compare.teacher: found null, expected the Hub id or folder of the teacher's weights, since"
            f" label.teacher ({teacher.teacher}) is a server's; set it"
        )
    return teacher


def _provenance(
    teacher: LabelParams,
    models: Path,
    train: Mapping[str, Sequence[Record]],
    heldout: Mapping[str, Sequence[Record]],
) -> dict[str, Any]:
    """Return what the report says about its origin."""
    origin: dict[str, Any] = {
        "teacher": {"model": teacher.teacher, "quantization": teacher.quantization},
        "training examples": {mode: len(records) for mode, records in train.items()},
        # Held-out prompts that are in training too: none, or the figures flatter the student
        "overlap": {mode: overlap(train[mode], heldout[mode]) for mode in train},
    }
    for mode in train:
        path = models / mode / "provenance.json"
        if path.is_file():
            origin[mode] = read_json(path)
    return origin
