"""System 1: instructions with their outputs, as DistilQwen_100k has them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_app.core.errors import SchemaError
from distill_app.core.files import RECORD_FIELDS
from distill_app.data.cells import (
    NOT_TEXT,
    collapsed,
    filled,
    has_nul,
    identities,
    is_blank,
    is_not_text,
    texts,
)
from distill_app.data.chat import chat_column, with_records
from distill_app.data.decontamination import drop_overlaps
from distill_app.data.languages import drop_other_languages
from distill_app.data.likeness import drop_near_duplicates
from distill_app.data.scratch import file_errors, named
from distill_app.data.selection import Examples, Outputs, Reasons, Selection, require_row
from distill_app.data.sources import READING, Dataset, Reading, Source, open_sources
from distill_app.data.tables import Batch

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class InstructionRules:
    """Which instructions a student learns from; a rule that is None is off.

    Args:
        min_chars, max_chars: of instruction and input together.
        max_output_chars: of the dataset's own output.
        max_tokens: of prompt, output and end of sequence, as training counts them, by `tokenizer`.
        tokenizer: folder or Hub id of the student.
        tokenizer_revision: commit, tag or branch of a Hub tokenizer; None is its default branch.
        languages: ISO 639-1 codes of those to keep.
        near_duplicates: the share of common word triples (Jaccard, estimated by MinHash) from which on
            the later of two instructions is dropped.
        overlap_words: an instruction to train on that shares so many words in a row with a held-out one or
            with a text in `benchmarks` is dropped.
        overlap_masked: so is one that is the same but for names and numbers.
        benchmarks: files (Parquet, JSON, JSON lines, CSV) whose texts must not be trained on.

    Raises:
        ValueError: rules that no instruction can fit, or that lack a part.
    """

    min_chars: int | None = None
    max_chars: int | None = None
    max_output_chars: int | None = None
    max_tokens: int | None = None
    tokenizer: str | None = None
    tokenizer_revision: str | None = None
    languages: tuple[str, ...] | None = None
    near_duplicates: float | None = None
    overlap_words: int | None = None
    overlap_masked: bool = False
    benchmarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        low, high = self.min_chars, self.max_chars
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_chars {low} is over max_chars {high}; swap them")
        if self.max_tokens is not None and self.tokenizer is None:
            raise ValueError("max_tokens: no tokenizer to count with; name the student's in tokenizer")
        require_overlap_rule(self.benchmarks, self.overlap_words, self.overlap_masked)


def require_overlap_rule(benchmarks: Sequence[str], overlap_words: int | None, overlap_masked: bool) -> None:
    """Raise ValueError if benchmarks are named, but not what an overlap is."""
    if benchmarks and overlap_words is None and not overlap_masked:
        raise ValueError("benchmarks: overlap_words is not set; say how many words in a row count, e.g. 13")


def prepare_instructions(
    datasets: Dataset | Sequence[Dataset],
    rules: InstructionRules,
    heldout_fraction: float,
    seed: int,
    outputs: Outputs,
    reading: Reading = READING,
) -> dict[str, Any]:
    """Write the slices' instructions, training and held out, in dataset order, and return their counts.

    The first of a duplicate, equal but for white space, stays.

    Raises:
        EmptyDataError: a slice has no rows, or no instruction is left after selection.
        SchemaError: there is no `instruction` column, and no conversation.
        OSError, ValueError: see `open_sources`.
    """
    with _selected(datasets, rules, heldout_fraction, seed, reading) as selection:
        selection.write(outputs)
        return {"rows_in": selection.rows_in, **selection.summary()}


def explain_instructions(
    datasets: Dataset | Sequence[Dataset],
    rules: InstructionRules,
    heldout_fraction: float,
    seed: int,
    row: int,
    reading: Reading = READING,
) -> list[str]:
    """Return what becomes of a row, and which rule took it; nothing is written."""
    with _selected(datasets, rules, heldout_fraction, seed, reading, row) as selection:
        return selection.explain()


@contextmanager
def _selected(
    datasets: Dataset | Sequence[Dataset],
    rules: InstructionRules,
    heldout_fraction: float,
    seed: int,
    reading: Reading,
    asked: int | None = None,
) -> Iterator[Selection]:
    with open_sources(datasets, reading) as sources:
        if asked is not None:
            require_row(sources, asked)
        selection = Selection(sources, seed, asked)
        for source in sources.every:
            _read(source, rules, selection)
        selection.close()
        if rules.languages is not None:
            drop_other_languages(selection, rules.languages)
        if rules.tokenizer is not None:
            selection.count_tokens("system1", rules.tokenizer, rules.tokenizer_revision)
        if rules.max_tokens is not None:
            selection.drop_long(rules.max_tokens)
        selection.drop_duplicates()
        if rules.near_duplicates is not None:
            drop_near_duplicates(selection, rules.near_duplicates, seed)
        selection.split(heldout_fraction)
        selection.require_some()
        if rules.overlap_words is not None or rules.overlap_masked:
            drop_overlaps(selection, rules.overlap_words, rules.overlap_masked, rules.benchmarks)
            selection.require_some()
        yield selection


def _read(source: Source, rules: InstructionRules, selection: Selection) -> None:
    chat = None if "instruction" in source.types else chat_column(source.types)
    if "instruction" not in source.types and chat is None:
        raise SchemaError(
            f"{source.name}: found columns {named(source.types)}; expected instruction, output and optionally"
            " input, or messages, or conversations; say in columns what yours are called"
        )
    wanted = [*([chat] if chat else RECORD_FIELDS), *(["fault"] if source.is_text else [])]
    for batch in source.batches(dict.fromkeys(wanted)):
        with file_errors(batch.part.file):
            examples = _examples(with_records(batch) if chat else batch, rules)
        selection.add(examples, len(batch))


def _examples(batch: Batch, rules: InstructionRules) -> Examples:
    """Say of each row why it is dropped, if it is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    count = len(batch)
    reasons = Reasons(count)
    drop_faults(reasons, batch.columns.get("fault"))
    absent = pa.nulls(count, pa.large_string())
    cells = [texts(batch.columns[name]) if name in batch.columns else absent for name in RECORD_FIELDS]
    for cell in cells:
        reasons.drop_where("not text", is_not_text(cell))
    instruction, given = asked_somewhere(cells[0], cells[1])
    output = filled(cells[2])
    for cell in (instruction, given, output):
        reasons.drop_where("not writable text", has_nul(cell))
    reasons.drop_where("no instruction", is_blank(instruction))
    chars = pc.add(pc.utf8_length(instruction), pc.utf8_length(given))
    lengths, output_lengths = (n.to_numpy(zero_copy_only=False) for n in (chars, pc.utf8_length(output)))
    if rules.min_chars is not None:
        reasons.drop_where("under min_chars", lengths < rules.min_chars)
    if rules.max_chars is not None:
        reasons.drop_where("over max_chars", lengths > rules.max_chars)
    if rules.max_output_chars is not None:
        reasons.drop_where("over max_output_chars", output_lengths > rules.max_output_chars)
    taken = pa.array(reasons.left())
    left = [column.take(taken) for column in (instruction, given, output)]
    return Examples(
        reasons=reasons,
        row=np.arange(count),
        trace=None,
        facts={"chars": chars},
        shown=lambda at: shown(instruction=instruction[at], input=given[at], output=output[at]),
        instruction=left[0],
        input=left[1],
        output=left[2],
        text_id=question_ids(left[0], left[1]),
        output_id=np.zeros(len(taken), np.int64),
        distance=np.zeros(len(taken)),
    )


def drop_faults(reasons: Reasons, fault: "pa.Array | None") -> None:
    """Drop what text files have that is no object, or says a thing twice."""
    if fault is not None and fault.null_count < len(fault):
        every = np.array(fault.to_pylist(), object)
        for reason in fault.unique().drop_null().to_pylist():
            reasons.drop_where(reason, every == reason)


def asked_somewhere(instruction: "pa.Array", given: "pa.Array") -> "tuple[pa.Array, pa.Array]":
    """Return instruction and input without nulls, with the input as the instruction where that is blank."""
    import pyarrow as pa
    import pyarrow.compute as pc

    instruction, given = filled(instruction), filled(given)
    blank = is_blank(instruction)
    if not blank.any():
        return instruction, given
    empty = pa.scalar("", pa.large_string())
    return pc.if_else(pa.array(blank), given, instruction), pc.if_else(pa.array(blank), empty, given)


def question_ids(instruction: "pa.Array", given: "pa.Array") -> "np.ndarray[Any, Any]":
    """Return a number for each question, the same for those that are equal but for white space."""
    import pyarrow as pa
    import pyarrow.compute as pc

    nul = pa.scalar("\0", pa.large_string())
    return identities(pc.binary_join_element_wise(collapsed(instruction), collapsed(given), nul))


def shown(**cells: Any) -> dict[str, str | None]:
    """Return the texts of one example as a person sees them."""
    found = {name: cell.as_py() for name, cell in cells.items()}
    return {name: None if text == NOT_TEXT else text for name, text in found.items()}
