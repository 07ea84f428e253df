"""The `measure` section of params.yaml."""

from typing import Literal

from pydantic import Field

from distill_app.core.params import Section


class MeasureParams(Section):
    """How much held-out data is asked, how speed is measured, and who judges."""

    teacher: str | None  # Hub id or folder of the weights to compare with; None takes label.teacher
    instruction_prompts: int = Field(ge=1)  # at most; all held-out records if there are fewer
    reasoning_prompts: int = Field(ge=1)
    max_new_tokens: int = Field(ge=1)  # an answer ends here at the latest
    batch_size: int = Field(ge=1)  # answers generated at a time
    speed_prompts: int = Field(ge=1)  # asked one at a time and then all at once
    speed_tokens: int = Field(ge=1)  # generated a prompt then, by every model
    speed_rounds: int = Field(ge=1)  # the fastest counts
    judge: str | None  # the model that says which of two answers is better; None asks nobody
    judge_engine: Literal["transformers", "vllm", "openai"]
    judge_base_url: str | None  # of an OpenAI-compatible server
