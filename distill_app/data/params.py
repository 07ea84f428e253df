"""The sections of params.yaml that the two prepare stages read."""

from pydantic import Field

from distill_app.core.params import Section


class PrepareS1Params(Section):
    dataset: str  # Hub id, or a local folder or file (Parquet, JSON, JSON lines, CSV)
    revision: str | None  # commit, tag or branch of the Hub dataset; null for a local one
    slice: str  # rows to take, as `datasets` writes it: train[:1000], train[10%:20%]
    heldout_fraction: float = Field(gt=0, lt=1)  # share of the texts kept out of training
    seed: int  # of the held-out split


class PrepareS2Params(Section):
    dataset: str  # Hub id, or a local folder or file (Parquet, JSON, JSON lines, CSV)
    revision: str | None  # commit, tag or branch of the Hub dataset; null for a local one
    slice: str  # rows (questions) to take; a row holds several traces
    rv_min: int | None = Field(ge=0, le=9)  # Reasoning Verbosity level, inclusive; null: open
    rv_max: int | None = Field(ge=0, le=9)
    cd_min: int | None = Field(ge=0, le=9)  # Cognitive Difficulty level, inclusive; null: open
    cd_max: int | None = Field(ge=0, le=9)
    verified_only: bool  # only traces whose answer was checked as correct
    max_traces: int | None = Field(ge=1)  # shortest traces kept a question; null: all
    heldout_fraction: float = Field(gt=0, lt=1)  # share of the questions kept out of training
    seed: int  # of the held-out split
