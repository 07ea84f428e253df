"""The sections of params.yaml that the two prepare stages read."""

from typing import Any

from pydantic import Field

from distill_app.core.params import Section
from distill_app.data.instructions import InstructionRules
from distill_app.data.reasoning import TraceRules


class _SourceParams(Section):
    dataset: str  # Hub id, or a local folder or file (Parquet, JSON, JSON lines, CSV)
    revision: str | None  # commit, tag or branch of the Hub dataset; null for a local one
    slice: str  # rows to take, as `datasets` writes it: train[:1000], train[10%:20%]
    heldout_fraction: float = Field(gt=0, lt=1)  # share of the texts kept out of training
    seed: int  # of the held-out split, near duplicates and the sample of rejects

    def source(self) -> dict[str, Any]:
        """Return the arguments that both prepare functions share."""
        return {
            "dataset": self.dataset,
            "slice_str": self.slice,
            "revision": self.revision,
            "heldout_fraction": self.heldout_fraction,
            "seed": self.seed,
        }

    def _rules(self) -> dict[str, Any]:
        values = self.model_dump(exclude=set(_SourceParams.model_fields))
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


class PrepareS1Params(_SourceParams):
    min_chars: int | None = Field(ge=0)  # of instruction and input; null: no limit
    max_chars: int | None = Field(ge=1)
    max_output_chars: int | None = Field(ge=1)
    max_tokens: int | None = Field(ge=1)  # of prompt and output, by tokenizer
    tokenizer: str | None  # folder or Hub id; null estimates tokens from bytes
    languages: list[str] | None  # ISO 639-1 codes to keep; null: all
    near_duplicates: float | None = Field(gt=0, le=1)  # Jaccard similarity from which on; null: keep them
    overlap_words: int | None = Field(ge=2)  # in a row, shared with held-out or benchmark texts; null: off
    benchmarks: list[str]  # files that must not be trained on

    def rules(self) -> InstructionRules:
        return InstructionRules(**self._rules())


class PrepareS2Params(_SourceParams):
    rv_min: int | None = Field(ge=0, le=9)  # Reasoning Verbosity level, inclusive; null: open
    rv_max: int | None = Field(ge=0, le=9)
    cd_min: int | None = Field(ge=0, le=9)  # Cognitive Difficulty level, inclusive; null: open
    cd_max: int | None = Field(ge=0, le=9)
    verified_only: bool  # only traces whose answer was checked as correct
    teachers: list[str] | None  # whose traces are kept; null: all
    max_traces: int | None = Field(ge=1)  # kept a question: nearest to the targets, then shortest; null: all
    rv_target: int | None = Field(ge=0, le=9)
    cd_target: int | None = Field(ge=0, le=9)
    max_tokens: int | None = Field(ge=1)  # of prompt and trace, by tokenizer
    tokenizer: str | None  # folder or Hub id; null estimates tokens from bytes

    def rules(self) -> TraceRules:
        return TraceRules(**self._rules())
