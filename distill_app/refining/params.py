"""The `refine_s1` and `refine_s2` sections of params.yaml."""

from typing import Literal

from pydantic import Field

from distill_app.core.params import Section


class RefineParams(Section):
    """One student's on-policy distillation, after its training on words."""

    steps: int = Field(ge=0)  # 0 leaves it out
    batch_size: int = Field(ge=1)  # prompts a step
    on_policy: float = Field(ge=0, le=1)  # share of steps whose answers the student writes
    divergence: Literal["reverse_kld", "forward_kld", "jsd"]
    temperature: float = Field(gt=0)  # of the student's draws and of both distributions
    max_new_tokens: int = Field(ge=1)  # of an answer that the student writes
    learning_rate: float = Field(gt=0)
    gradient_checkpointing: bool
    save_steps: int = Field(ge=1)  # between checkpoints
    seed: int


class RefineS2Params(RefineParams):
    """System 2's refinement: by its teacher's distribution, or by answers that are verified."""

    method: Literal["on_policy", "verified"]
    rounds: int = Field(ge=0)  # of verification; 0 leaves it out
    samples: int = Field(ge=1)  # answers that the student draws to each problem, in each round
    keep: int = Field(ge=1)  # distinct right answers to a problem that are learned, at most
    start: Literal["before", "trained"]  # from where each round trains: before train_s2, or after it
    problems: str | None  # a file of further problems, records whose output names the right answer

    @property
    def verifies(self) -> bool:
        """Whether there are verification rounds."""
        return self.method == "verified" and self.rounds > 0
