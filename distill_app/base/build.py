"""Building `models/base/`: the teacher, and each student's starting point cut from it."""

import copy
import os
from pathlib import Path
from typing import Any

from distill_app.base.calibration import CALIBRATION
from distill_app.base.embedded import load_base_teacher
from distill_app.base.params import BaseModelsParams
from distill_app.base.pruning import block_influence, drop_layers, least_important
from distill_app.core.files import new_folder, save_text
from distill_app.core.models import Model, Tokenizer, save_checkpoint

NOT_BUILT = "base_models.teacher is null: the params name the teacher and the students directly.\n"


def build_base_models(params: BaseModelsParams, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Write `teacher`, `system1` and `system2` below `folder`; return each layer's influence and fate.

    With `teacher: null` the three folders hold only a note, so that the graph stays the same.
    """
    folder = Path(folder)
    if params.teacher is None:
        for name in ("teacher", "system1", "system2"):
            save_text(folder / name / "NOT_BUILT.txt", NOT_BUILT)
        return {"built": False}
    model, tokenizer = load_base_teacher(params.teacher)
    influence = block_influence(model, tokenizer, _calibration_texts(tokenizer))
    _save(model, tokenizer, folder / "teacher")
    report: dict[str, Any] = {"built": True, "influence": [round(x, 4) for x in influence]}
    for name, layers in (("system1", params.system1_layers), ("system2", params.system2_layers)):
        if layers > len(influence):
            raise ValueError(
                f"base_models.{name}_layers: found {layers}, the teacher has {len(influence)}; keep fewer"
            )
        dropped = least_important(influence, len(influence) - layers)
        student = copy.deepcopy(model)
        drop_layers(student, dropped)
        _save(student, tokenizer, folder / name)
        report[name] = {"dropped_layers": dropped, "parameters": student.num_parameters()}
    return report


def _save(model: Model, tokenizer: Tokenizer, folder: Path) -> None:
    with new_folder(folder) as part:
        save_checkpoint(model, tokenizer, part)


def _calibration_texts(tokenizer: Tokenizer) -> list[str]:
    if not tokenizer.chat_template:
        return [f"{question}\n{answer}" for question, answer in CALIBRATION]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            tokenize=False,
        )
        for question, answer in CALIBRATION
    ]
