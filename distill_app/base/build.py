"""Building `models/base/`: the teacher, and each student's starting point cut from it."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_app.base.calibration import CALIBRATION
from distill_app.base.embedded import about_teacher, load_base_teacher
from distill_app.base.params import BaseModelsParams
from distill_app.base.pruning import block_influence, drop_layers, least_important
from distill_app.core.files import new_folder, save_text
from distill_app.core.models import Model, Tokenizer, save_checkpoint
from distill_app.report.cards.origin import model_digest, unplaced

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
    about = about_teacher(params.teacher)
    _save(model, tokenizer, folder / "teacher", _card("teacher", about, params.teacher))
    teacher = {"model": unplaced(str(folder / "teacher")), "sha256": model_digest(str(folder / "teacher"))}
    report: dict[str, Any] = {"built": True, "influence": [round(x, 4) for x in influence]}
    for name, layers in (("system1", params.system1_layers), ("system2", params.system2_layers)):
        if layers > len(influence):
            raise ValueError(
                f"base_models.{name}_layers: found {layers}, the teacher has {len(influence)}; keep fewer"
            )
        dropped = least_important(influence, len(influence) - layers)
        student = copy.deepcopy(model)
        drop_layers(student, dropped)
        cut = {"made_from": {**teacher, "dropped_layers": dropped}}
        _save(student, tokenizer, folder / name, _card(name, {**about, **cut}, params.teacher))
        report[name] = {"dropped_layers": dropped, "parameters": student.num_parameters()}
    return report


def _save(model: Model, tokenizer: Tokenizer, folder: Path, card: str) -> None:
    with new_folder(folder) as part:
        save_checkpoint(model, tokenizer, part)
        save_text(part / "README.md", card)


def _card(name: str, about: Mapping[str, Any], source: str) -> str:
    """Return the card of a base model, from whose metadata a student's card learns of parent and licence."""
    from huggingface_hub import ModelCardData

    metadata = {"license": "unknown", "library_name": "transformers", "pipeline_tag": "text-generation"}
    data = ModelCardData(**(metadata | dict(about)))
    lines = [f"The weights of `{unplaced(source)}`, as a checkpoint in bfloat16."]
    if "made_from" in about:
        dropped = ", ".join(map(str, about["made_from"]["dropped_layers"])) or "none"
        lines.append(f"Layers left out, counted from 0: {dropped}. Not trained since: a student starts here.")
    return f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n" + "\n".join(lines) + "\n"


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
