"""The `measure` section of params.yaml."""

from typing import Literal

from pydantic import ConfigDict, Field

from distill_app.evaluation.candidates import TeacherParams


class MeasureParams(TeacherParams):
    """How much held-out data is asked, how cost is measured, and who judges."""

    model_config = ConfigDict(extra="forbid")

    engine: Literal["transformers", "vllm", "openai"]  # what answers and is timed
    servers: dict[str, str]  # with engine openai: each model's name in the comparison, and its base URL
    instruction_prompts: int = Field(ge=1)  # at most; all held-out records if there are fewer
    reasoning_prompts: int = Field(ge=1)
    fidelity_prompts: int = Field(ge=1)  # of the instructions, whose answers all models read token by token
    max_new_tokens: int = Field(ge=1)  # an answer ends here at the latest
    batch_size: int = Field(ge=1)  # answers generated at a time
    timed_prompts: int = Field(ge=1)  # answered one at a time when cost is measured
    load_prompts: int = Field(ge=1)  # answered at once then
    timed_tokens: int | None = Field(ge=2)  # of each timed answer, at most; None times whole answers
    timed_rounds: int = Field(ge=2)  # how often all is timed; their spread is the run-to-run noise
    judge: str | None  # the model that says which of two answers is better; None asks nobody
    judge_revision: str | None  # of a Hub model: commit, tag or branch
    judge_engine: Literal["transformers", "vllm", "openai"]
    judge_max_new_tokens: int = Field(ge=1)  # of its reasoning and its verdict
    judge_base_url: str | None  # of an OpenAI-compatible server

    def hosted(self) -> set[str]:
        """Return `judge` where its server alone has it."""
        return {"judge"} if self.judge_engine == "openai" else set()
