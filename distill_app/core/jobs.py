"""The sections of an EasyDistill 1.0 config that labelling and training both read."""

from typing import Literal

from pydantic import Field

from distill_app.core.models import Quantization
from distill_app.core.params import Section

LABELLING_JOBS = ("kd_black_box_local", "kd_black_box_api", "kd_white_box")
JOB_TYPES = (*LABELLING_JOBS, "kd_black_box_train_only", "kd_white_box_train_only")


class Dataset(Section):
    """The `dataset` section; paths are relative to the current folder."""

    labeled_path: str = Field(min_length=1)
    instruction_path: str | None = None
    logits_path: str | None = None
    template: str | None = None
    seed: int = 42
    too_long: Literal["drop", "cut"] = "drop"  # examples over max_length tokens; EasyDistill ignores it


class Models(Section):
    """The `models` section: Hub ids or folders. Labelling needs the teacher, training the student."""

    student: str | None = None
    teacher: str | None = None
    quantization: Quantization = "none"  # of a student under LoRA; EasyDistill ignores it
