"""The `label` section of params.yaml."""

from typing import Literal

from pydantic import Field

from distill_app.core.models import Quantization
from distill_app.core.params import Section

# What changes speed, memory or place and never an answer; dvc.yaml's stage lists all the others.
RUNTIME_ONLY = {"batch_size", "engine_workers", "gpus_per_worker", "ray_address", "concurrency", "store"}


class LabelParams(Section):
    """How the teacher is asked."""

    teacher: str  # Hub id or checkpoint folder; with engine openai the server's name for its model
    revision: str | None  # of a Hub model: commit, tag or branch
    quantization: Quantization
    engine: Literal["transformers", "vllm", "openai"]
    base_url: str | None  # of an OpenAI-compatible server
    engine_workers: int = Field(ge=1)  # copies of the model, on Ray where more than one
    gpus_per_worker: int = Field(ge=1)  # over which vLLM spreads one copy (tensor parallelism)
    ray_address: str | None  # of a Ray cluster
    concurrency: int = Field(ge=1)  # requests to a server at a time
    batch_size: int = Field(ge=1)  # answers generated at a time
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(ge=0)  # 0 takes the likeliest token
    top_p: float = Field(gt=0, le=1)
    seed: int
    on_truncated: Literal["drop", "keep", "retry"]  # an answer that reached max_new_tokens
    retry_max_new_tokens: int = Field(ge=1)  # retry doubles the limit up to here
    top_logits: int = Field(ge=0, le=1024)  # likeliest tokens kept for each answer token; 0 keeps none
    store: str  # the file that keeps the answers
