"""The sections of params.yaml that the two prepare stages read."""

from typing import Annotated, Any

from pydantic import Field

from distill_app.core.params import NoPath, Section
from distill_app.data.instructions import InstructionRules
from distill_app.data.reasoning import TraceRules
from distill_app.data.sources import Dataset, Reading


class _DatasetParams(Section):
    dataset: str  # Hub id, or a local folder or file (Parquet, JSON, JSON lines, CSV)
    revision: str | None  # commit, tag or branch of the Hub dataset; null for a local one
    config: Annotated[str | None, NoPath()]  # one of those that the dataset has, such as main of openai/gsm8k
    slice: Annotated[str, NoPath()]  # rows to take, as `datasets` writes it: train[:1000], train[10%:20%]
    columns: Annotated[dict[str, str], NoPath()]  # our name: the dataset's, such as {output: solution}
    weight: float | None = Field(gt=0)  # of a mixture; null takes all rows

    def source(self) -> Dataset:
        return Dataset(self.dataset, self.slice, self.revision, self.config, self.columns, self.weight)


class _SourceParams(_DatasetParams):
    mix: list[_DatasetParams]  # further datasets, with the same keys as the first
    heldout_fraction: float = Field(gt=0, lt=1)  # share of the texts kept out of training
    seed: int  # of the held-out split, near duplicates and the sample of rejects
    memory_gb: float = Field(gt=0.5)  # of the whole process; what it takes for data, not a hard limit

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that both prepare functions share."""
        return {
            "datasets": [self.source(), *(further.source() for further in self.mix)],
            "heldout_fraction": self.heldout_fraction,
            "seed": self.seed,
            "reading": Reading(self.memory_gb),
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
    tokenizer_revision: str | None  # of a Hub tokenizer: commit, tag or branch
    languages: Annotated[list[str] | None, NoPath()]  # ISO 639-1 codes to keep; null: all
    near_duplicates: float | None = Field(gt=0, le=1)  # Jaccard similarity from which on; null: keep them
    overlap_words: int | None = Field(ge=2)  # in a row, shared with held-out or benchmark texts; null: off
    overlap_masked: bool  # also what is the same as those but for names and numbers
    benchmarks: list[str]  # files that must not be trained on

    def rules(self) -> InstructionRules:
        return InstructionRules(**self._rules())


class PrepareS2Params(_SourceParams):
    rv_min: int | None = Field(ge=0, le=9)  # Reasoning Verbosity level, inclusive; null: open
    rv_max: int | None = Field(ge=0, le=9)
    cd_min: int | None = Field(ge=0, le=9)  # Cognitive Difficulty level, inclusive; null: open
    cd_max: int | None = Field(ge=0, le=9)
    verified_only: bool  # only traces whose answer was checked as correct
    teachers: Annotated[list[str] | None, NoPath()]  # whose traces are kept; null: all
    max_traces: int | None = Field(ge=1)  # kept a question: nearest to the targets, then shortest; null: all
    rv_target: int | None = Field(ge=0, le=9)
    cd_target: int | None = Field(ge=0, le=9)
    max_tokens: int | None = Field(ge=1)  # of prompt and trace, by tokenizer
    tokenizer: str | None  # folder or Hub id; null estimates tokens from bytes
    tokenizer_revision: str | None  # of a Hub tokenizer: commit, tag or branch
    heldout_frames: float = Field(ge=0, lt=1)  # share of the problems' frames kept out of training whole
    overlap_words: int | None = Field(ge=2)  # as in prepare_s1, of the questions
    overlap_masked: bool
    benchmarks: list[str]

    def rules(self) -> TraceRules:
        return TraceRules(**self._rules())
