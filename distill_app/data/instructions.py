"""System 1: instructions with their outputs, as DistilQwen_100k has them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distill_app.core.errors import SchemaError
from distill_app.core.files import RECORD_FIELDS
from distill_app.data.cells import asked_somewhere, collapsed, is_blank, is_not_text, is_unwritable, text
from distill_app.data.engine import named
from distill_app.data.languages import drop_other_languages
from distill_app.data.likeness import drop_benchmark_texts, drop_near_duplicates
from distill_app.data.selection import Outputs, Selection, case
from distill_app.data.sources import Source, open_source


@dataclass(frozen=True)
class InstructionRules:
    """Which instructions a student learns from; a rule that is None is off.

    Args:
        min_chars, max_chars: of instruction and input together.
        max_output_chars: of the dataset's own output.
        max_tokens: of prompt, output and end of sequence, as training counts them, by `tokenizer`.
        tokenizer: folder or Hub id of the student.
        languages: ISO 639-1 codes of those to keep.
        near_duplicates: the share of common word triples (Jaccard, estimated by MinHash) from which on
            the later of two instructions is dropped.
        overlap_words: an instruction to train on that shares so many words in a row with a held-out one or
            with a text in `benchmarks` is dropped.
        benchmarks: files (Parquet, JSON, JSON lines, CSV) whose texts must not be trained on.

    Raises:
        ValueError: rules that no instruction can fit, or that lack a part.
    """

    min_chars: int | None = None
    max_chars: int | None = None
    max_output_chars: int | None = None
    max_tokens: int | None = None
    tokenizer: str | None = None
    languages: tuple[str, ...] | None = None
    near_duplicates: float | None = None
    overlap_words: int | None = None
    benchmarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        low, high = self.min_chars, self.max_chars
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_chars {low} is over max_chars {high}; swap them")
        if self.max_tokens is not None and self.tokenizer is None:
            raise ValueError("max_tokens: no tokenizer to count with; name the student's in tokenizer")
        if self.benchmarks and self.overlap_words is None:
            raise ValueError(
                "benchmarks: overlap_words is not set; say how many words in a row count, e.g. 13"
            )


def prepare_instructions(
    dataset: str,
    slice_str: str,
    revision: str | None,
    rules: InstructionRules,
    heldout_fraction: float,
    seed: int,
    outputs: Outputs,
    threads: int | None = None,
) -> dict[str, Any]:
    """Write a slice's instructions, training and held out, in dataset order, and return their counts.

    `input` and `output` are "" where absent or null. A row that has its text in `input` alone gives that as
    the instruction. Of duplicates (the same instruction and input but for white space; punctuation tells
    `3 * 4` from `3 / 4`) the first stays.

    Raises:
        EmptyDataError: the slice has no rows, or none is left after selection.
        SchemaError: there is no `instruction` column.
        OSError, ValueError: see `open_source`.
    """
    with _selected(dataset, slice_str, revision, rules, heldout_fraction, seed, threads) as selection:
        selection.write(outputs, seed)
        return {"rows_in": selection.rows_in, **selection.summary()}


def explain_instructions(
    dataset: str,
    slice_str: str,
    revision: str | None,
    rules: InstructionRules,
    heldout_fraction: float,
    seed: int,
    row: int,
) -> list[str]:
    """Return what becomes of a row, and which rule took it; nothing is written."""
    with _selected(dataset, slice_str, revision, rules, heldout_fraction, seed) as selection:
        return selection.explain(row)


@contextmanager
def _selected(
    dataset: str,
    slice_str: str,
    revision: str | None,
    rules: InstructionRules,
    heldout_fraction: float,
    seed: int,
    threads: int | None = None,
) -> Iterator[Selection]:
    with open_source(dataset, slice_str, revision, threads) as source:
        if "instruction" not in source.types:
            raise SchemaError(
                f"{source.name}: found columns {named(source.types)}; expected instruction, output and"
                " optionally input; rename the columns"
            )
        selection = Selection(source, _staging(source, rules), _question(source))
        if rules.languages is not None:
            drop_other_languages(selection, rules.languages)
        if rules.tokenizer is not None:
            selection.count_tokens(rules.tokenizer, "system1")
        if rules.max_tokens is not None:
            selection.drop("over max_tokens", f"SELECT n FROM taken WHERE tokens > {rules.max_tokens}")
        selection.drop_duplicates()
        if rules.near_duplicates is not None:
            drop_near_duplicates(selection, rules.near_duplicates, seed)
        selection.split(heldout_fraction, seed)
        selection.require_some()
        if rules.overlap_words is not None:
            drop_benchmark_texts(selection, rules.overlap_words, rules.benchmarks)
            selection.require_some()
        yield selection


def _question(source: Source) -> str:
    cell = text("instruction", source.types["instruction"])
    return f"SELECT row, {cell} AS instruction FROM ({source.rows(['instruction'])})"


def _staging(source: Source, rules: InstructionRules) -> str:
    """Return SQL that says of each row why it is dropped."""
    kinds = {name: source.types.get(name) for name in RECORD_FIELDS}
    texts = ", ".join(f"{text(name, kind)} AS {name}" for name, kind in kinds.items())
    wrong = " OR ".join(is_not_text(name, kind) for name, kind in kinds.items())
    chars = "length(instruction) + length(input)"
    checks = [
        ("fault IS NOT NULL", "fault"),
        ("is_not_text", "'not text'"),
        (" OR ".join(map(is_unwritable, RECORD_FIELDS)), "'not writable text'"),
        (is_blank("instruction"), "'no instruction'"),
    ]
    limits = (
        (chars, "<", rules.min_chars, "under min_chars"),
        (chars, ">", rules.max_chars, "over max_chars"),
        ("length(output)", ">", rules.max_output_chars, "over max_output_chars"),
    )
    checks += [
        (f"{what} {sign} {limit}", f"'{name}'") for what, sign, limit, name in limits if limit is not None
    ]
    read = f"SELECT row, fault, ({wrong}) AS is_not_text, {texts} FROM ({source.rows(RECORD_FIELDS)})"
    return (
        f"SELECT row, NULL::BIGINT AS trace, {case(checks)} AS reason, {chars} AS chars,"
        f" hash({collapsed('instruction')}, {collapsed('input')}) AS text_id, 0::UBIGINT AS output_id,"
        " NULL::DOUBLE AS distance, instruction, input, coalesce(output, '') AS output,"
        " strlen(instruction) + strlen(input) + coalesce(strlen(output), 0) AS bytes"
        f" FROM ({asked_somewhere(read)})"
    )
