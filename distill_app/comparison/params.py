"""The `compare` section of params.yaml."""

from pydantic import Field

from distill_app.core.params import Section


class CompareParams(Section):
    """How much held-out data is asked, and how."""

    teacher: str | None  # Hub id or folder of the weights to compare with; None takes label.teacher
    system1_prompts: int = Field(ge=1)  # at most; all held-out records if there are fewer
    system2_prompts: int = Field(ge=1)
    max_new_tokens: int = Field(ge=1)  # an answer ends here at the latest
    batch_size: int = Field(ge=1)  # answers generated at a time
    speed_prompts: int = Field(ge=1)  # asked at once when speed is measured
    speed_tokens: int = Field(ge=1)  # generated a prompt then, by every model
    speed_rounds: int = Field(ge=1)  # the fastest counts
