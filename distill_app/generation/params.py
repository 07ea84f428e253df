"""The part of a params section that says which model answers, and with what engine."""

from typing import Annotated, Literal

from pydantic import Field

from distill_app.core.models import Quantization
from distill_app.core.params import NoPath, Section


class EngineParams(Section):
    """Which model answers, and what computes its answers."""

    teacher: str  # Hub id or checkpoint folder; with engine openai the server's name for its model
    revision: str | None  # of a Hub model: commit, tag or branch
    quantization: Quantization
    engine: Literal["transformers", "vllm", "openai"]
    base_url: str | None  # of an OpenAI-compatible server
    system_prompt: Annotated[str | None, NoPath()]  # told before each prompt; None leaves it to the template
    engine_workers: int = Field(ge=1)  # copies of the model, on Ray where more than one
    gpus_per_worker: int = Field(ge=1)  # over which vLLM spreads one copy (tensor parallelism)
    ray_address: str | None  # of a Ray cluster
    concurrency: int = Field(ge=1)  # requests to a server at a time
    batch_api: bool  # whether a server is asked in batches, which take up to a day and cost less
    requests_per_minute: int | None = Field(ge=1)  # of a server
    tokens_per_minute: int | None = Field(ge=1)  # of a server, read and written together
    max_cost: float | None = Field(gt=0)  # of one run, in the currency of the prices
    price_in: float = Field(ge=0)  # of a million tokens read
    price_out: float = Field(ge=0)  # of a million tokens written
    batch_size: int = Field(ge=1)  # answers generated at a time
