"""The models of the comparison: the teacher, and each student before, after, and amid its distillation."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from distill_app.core.models import Quantization, check_checkpoint
from distill_app.core.params import Section
from distill_app.core.prompts import Mode
from distill_app.evaluation.students import student_folder
from distill_app.labeling.params import LabelParams


class TeacherParams(Section):
    """The values of section `measure` that say with which teacher the students are compared."""

    model_config = ConfigDict(extra="ignore")

    teacher: str | None  # Hub id or folder of its weights; None takes label.teacher
    teacher_revision: str | None  # of a Hub model: commit, tag or branch
    teacher_quantization: Quantization  # in which it would be served


@dataclass(frozen=True)
class Candidate:
    """One of the models: its name in the comparison, where it lies, and how it is asked.

    A distilled student is asked with the prompt of its `mode`, which it was trained on. The others (None) are
    asked in their own chat format, as whoever uses them undistilled would.
    """

    name: str
    model: str  # Hub id or folder; with `base_url` the server's name for it
    mode: Mode | None = None
    quantization: Quantization = "none"
    revision: str | None = None
    base_url: str | None = None  # of the server that answers for a model without weights here


def compared_models(
    label: LabelParams,
    weights: TeacherParams,
    system1_before: str,
    system2_before: str,
    models_dir: str,
    system1_revision: str | None = None,
    system2_revision: str | None = None,
) -> list[Candidate]:
    """Return the models to compare, the teacher first.

    A student that was refined on its own answers brings along the one that had learned from words alone.

    Raises:
        FileNotFoundError, ValueError: a student is not there or not whole.
    """
    return [
        _teacher(label, weights),
        Candidate("system1_before", system1_before, revision=system1_revision),
        *_students(models_dir, "system1"),
        Candidate("system2_before", system2_before, revision=system2_revision),
        *_students(models_dir, "system2"),
    ]


def _students(models_dir: str, mode: Mode) -> list[Candidate]:
    on_words, last = Path(models_dir) / mode, student_folder(models_dir, mode)
    for folder in {on_words, last}:
        check_checkpoint(folder)
    refined = [Candidate(f"{mode}_words", str(on_words), mode)] if last != on_words else []
    return [*refined, Candidate(mode, str(last), mode)]


def _teacher(label: LabelParams, weights: TeacherParams) -> Candidate:
    quantization = weights.teacher_quantization
    if weights.teacher is not None:
        return Candidate(
            "teacher", weights.teacher, quantization=quantization, revision=weights.teacher_revision
        )
    if label.engine == "openai":
        return Candidate("teacher", label.teacher, revision=label.revision, base_url=label.base_url)
    return Candidate("teacher", label.teacher, quantization=quantization, revision=label.revision)
