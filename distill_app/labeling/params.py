"""The `label` and `score_s2` sections of params.yaml."""

from typing import Annotated, Literal

from pydantic import Field

from distill_app.core.params import NoPath, Section
from distill_app.generation.params import EngineParams
from distill_app.labeling.choosing import Chooser

# What changes speed, memory or place and never an answer; dvc.yaml's stage lists all the others.
RUNTIME_ONLY = {
    "batch_size",
    "engine_workers",
    "gpus_per_worker",
    "ray_address",
    "concurrency",
    "batch_api",
    "requests_per_minute",
    "tokens_per_minute",
    "max_cost",
    "price_in",
    "price_out",
    "store",
}


class LabelParams(EngineParams):
    """How the teacher is asked."""

    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(ge=0)  # 0 takes the likeliest token
    top_p: float = Field(gt=0, le=1)
    top_k: int = Field(ge=0)  # so many likeliest tokens are drawn from; 0 is no limit
    min_p: float = Field(ge=0, lt=1)  # share of the likeliest token's probability below which none is drawn
    repetition_penalty: float = Field(gt=0)  # 1 is none
    generation_config: bool  # whether the model's own file replaces temperature to repetition_penalty
    stop: Annotated[list[str], NoPath()]  # texts at which an answer ends, without them
    seed: int
    samples: int = Field(ge=1)  # answers a prompt, each drawn with a seed of its own
    choose: Chooser  # which of several is kept
    judge: str | None  # the model that says which of two is better; None is the teacher
    judge_revision: str | None  # of a Hub model: commit, tag or branch
    judge_engine: Literal["transformers", "vllm", "openai"] | None  # None is the teacher's
    judge_base_url: str | None  # of an OpenAI-compatible server
    judge_max_new_tokens: int = Field(ge=1)  # of its reasoning and its verdict
    on_truncated: Literal["drop", "keep", "retry"]  # an answer that reached max_new_tokens
    retry_max_new_tokens: int = Field(ge=1)  # retry doubles the limit up to here
    top_logits: int = Field(ge=0, le=1024)  # likeliest tokens kept for each answer token; 0 keeps none
    store: str  # the folder that keeps the answers

    def hosted(self) -> set[str]:
        """Return `teacher` and `judge` where their server alone has them."""
        engines = {"teacher": self.engine, "judge": self.judge_engine or self.engine}
        return {name for name, engine in engines.items() if engine == "openai"}


class ScoreParams(Section):
    """The `score_s2` section: what the teacher of `label` says about System 2's traces."""

    top_logits: int = Field(ge=0, le=1024)  # as in `label`
