"""The five models of the comparison: the teacher, each student, and each student before distillation."""

from dataclasses import dataclass
from pathlib import Path

from distill_app.core.models import Quantization, check_checkpoint
from distill_app.core.prompts import Mode
from distill_app.labeling.params import LabelParams


@dataclass(frozen=True)
class Candidate:
    """One of the five: its name in the comparison, where it lies, and whose prompts it is asked with.

    A student is asked with the prompt of its `mode`, the teacher (None) in its own chat format.
    """

    name: str
    model: str  # Hub id or folder
    mode: Mode | None
    quantization: Quantization = "none"
    revision: str | None = None


def five_models(
    label: LabelParams, teacher: str | None, system1_before: str, system2_before: str, models_dir: str
) -> list[Candidate]:
    """Return the models to compare, the teacher first.

    Args:
        teacher: Hub id or folder of the teacher's weights; None takes label.teacher.

    Raises:
        FileNotFoundError, ValueError: a student is not there or not whole.
        ValueError: the teacher is a server's, and nothing says where its weights are.
    """
    students = Path(models_dir)
    for mode in ("system1", "system2"):
        check_checkpoint(students / mode)
    return [
        _teacher(label, teacher),
        Candidate("system1_before", system1_before, "system1"),
        Candidate("system1", str(students / "system1"), "system1"),
        Candidate("system2_before", system2_before, "system2"),
        Candidate("system2", str(students / "system2"), "system2"),
    ]


def _teacher(label: LabelParams, weights: str | None) -> Candidate:
    if weights is not None:
        return Candidate("teacher", weights, None, label.quantization)
    if label.engine == "openai":
        raise ValueError(
            "measure.teacher: found null, expected the Hub id or folder of the teacher's weights, since"
            f" label.teacher ({label.teacher}) is a server's; set it"
        )
    return Candidate("teacher", label.teacher, None, label.quantization, label.revision)
