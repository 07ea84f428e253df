"""The `label` section of params.yaml."""

from typing import Literal

from pydantic import Field

from distill_app.core.models import Quantization
from distill_app.core.params import Section


class LabelParams(Section):
    """How the teacher is asked."""

    teacher: str  # Hub id or checkpoint folder
    revision: str | None  # of a Hub model: commit, tag or branch
    quantization: Quantization
    batch_size: int = Field(ge=1)  # answers generated at a time
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(ge=0)  # 0 takes the likeliest token
    top_p: float = Field(gt=0, le=1)
    seed: int
    on_truncated: Literal["drop", "keep"]  # an answer that reached max_new_tokens
