"""System 2: reasoning traces, nested as OmniThought has them or flat, one trace a row."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_app.core.errors import SchemaError
from distill_app.data.cells import (
    NOT_TEXT,
    filled,
    has_nul,
    identities,
    is_blank,
    is_not_text,
    is_text,
    marks,
    numbers,
    texts,
)
from distill_app.data.chat import chat_column, with_records
from distill_app.data.decontamination import drop_overlaps
from distill_app.data.heldout import TRAIN
from distill_app.data.instructions import (
    asked_somewhere,
    drop_faults,
    question_ids,
    require_overlap_rule,
    shown,
)
from distill_app.data.scratch import file_errors, named
from distill_app.data.selection import Examples, Outputs, Reasons, Selection, require_row
from distill_app.data.sources import READING, Dataset, Reading, Source, open_sources
from distill_app.data.tables import Batch
from distill_app.data.textfiles import LEVELS, VERIFIED

if TYPE_CHECKING:
    import pyarrow as pa

QUESTION_COLUMNS = ("instruction", "question", "problem")
TRACE_COLUMNS = ("cot", "output", "response")
FLAT_FACTS = ("rv_score", "cd_score", VERIFIED, "teacher")
FLAT_COLUMNS = (*QUESTION_COLUMNS, *TRACE_COLUMNS, "input", *FLAT_FACTS)
RESPONSE = "full_response"
STAND_INS = ("thought", "solution")  # of a response that is empty
FACTS = ("teacher", VERIFIED, *(f"{column}.level" for column in LEVELS.values()))


@dataclass(frozen=True)
class TraceRules:
    """Which traces a student learns from; a rule that is None is off.

    Args:
        rv_min, rv_max, cd_min, cd_max: inclusive bounds of Reasoning Verbosity and Cognitive Difficulty,
            0 to 9 as OmniThought annotates them.
        verified_only: drop what was found wrong, and of nested traces what nobody checked. A mark is true or
            false, or 1 or 0, any other is as good as wrong. Where there is no such column at all, every trace
            stays.
        teachers: only traces that these wrote.
        max_traces: so many a question, however its white space is written: those nearest to the target
            levels, and of equals the shortest.
        rv_target, cd_target: the levels looked for; None for both takes the shortest (in characters).
        max_tokens: of prompt, trace and end of sequence, as training counts them, by `tokenizer`.
        tokenizer: folder or Hub id of the student.
        tokenizer_revision: commit, tag or branch of a Hub tokenizer; None is its default branch.
        heldout_frames: share of the problems' frames that are held out whole; see `frames.py`.
        overlap_words, overlap_masked, benchmarks: as for instructions, of the questions.

    Raises:
        ValueError: rules that no trace can fit.

    Source: RV/CD selection, arXiv:2505.10937, section 4.
    """

    rv_min: int | None = None
    rv_max: int | None = None
    cd_min: int | None = None
    cd_max: int | None = None
    verified_only: bool = True
    teachers: tuple[str, ...] | None = None
    max_traces: int | None = None
    rv_target: int | None = None
    cd_target: int | None = None
    max_tokens: int | None = None
    tokenizer: str | None = None
    tokenizer_revision: str | None = None
    heldout_frames: float = 0.0
    overlap_words: int | None = None
    overlap_masked: bool = False
    benchmarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in LEVELS:
            low, high = self.bounds(name)
            if low is not None and high is not None and low > high:
                raise ValueError(f"level bounds: {name}_min {low} is over {name}_max {high}; swap them")
        if self.max_traces is not None and self.max_traces < 1:
            raise ValueError(f"max_traces: found {self.max_traces}, expected 1 or more, or None for all")
        if self.max_tokens is not None and self.tokenizer is None:
            raise ValueError("max_tokens: no tokenizer to count with; name the student's in tokenizer")
        require_overlap_rule(self.benchmarks, self.overlap_words, self.overlap_masked)

    def bounds(self, level: str) -> tuple[int | None, int | None]:
        return getattr(self, f"{level}_min"), getattr(self, f"{level}_max")

    @property
    def levels_needed(self) -> list[str]:
        targets = {"rv": self.rv_target, "cd": self.cd_target}
        return [name for name in LEVELS if (*self.bounds(name), targets[name]) != (None, None, None)]


def prepare_traces(
    datasets: Dataset | Sequence[Dataset],
    rules: TraceRules,
    heldout_fraction: float,
    seed: int,
    outputs: Outputs,
    reading: Reading = READING,
) -> dict[str, Any]:
    """Write the slices' traces, training and held out (one a question), and return their counts.

    Records come by question, in dataset order; `output` is the full response, or thought and solution
    where that is empty. Of duplicates (the same output, to the letter, to the same question but for white
    space) the first stays. `dropped` counts traces by reason, but for "no trace" and what is wrong with a
    JSON row, which count rows.

    Raises:
        EmptyDataError: a slice has no rows, or no trace is left after selection.
        SchemaError: the columns are neither OmniThought's nor flat ones, or a rule's column has no value.
        OSError, ValueError: see `open_sources`.
    """
    with _selected(datasets, rules, heldout_fraction, seed, reading) as selection:
        selection.write(outputs)
        questions = len(np.unique(selection.key[selection.question[selection.taken(TRAIN)]]))
        counts = {
            "rows_in": selection.rows_in,
            "traces_in": selection.traces_in,
            "train_questions": questions,
        }
        counts |= {"heldout_frames": selection.heldout_frames} if rules.heldout_frames else {}
        return {**counts, **selection.summary()}


def explain_traces(
    datasets: Dataset | Sequence[Dataset],
    rules: TraceRules,
    heldout_fraction: float,
    seed: int,
    row: int,
    reading: Reading = READING,
) -> list[str]:
    """Return what becomes of each trace of a row, and which rule took it; nothing is written."""
    with _selected(datasets, rules, heldout_fraction, seed, reading, row) as selection:
        return selection.explain()


class _Traces(Selection):
    """A selection that counts its traces, and of how many something is known that a rule asks for."""

    traces_in = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.known = dict.fromkeys((*LEVELS, "teacher"), 0)


@contextmanager
def _selected(
    datasets: Dataset | Sequence[Dataset],
    rules: TraceRules,
    heldout_fraction: float,
    seed: int,
    reading: Reading,
    asked: int | None = None,
) -> Iterator[_Traces]:
    with open_sources(datasets, reading) as sources:
        if asked is not None:
            require_row(sources, asked)
        selection = _Traces(sources, seed, asked)
        for source in sources.every:
            _read(source, rules, selection)
        selection.close()
        if rules.tokenizer is not None:
            selection.count_tokens("system2", rules.tokenizer, rules.tokenizer_revision)
        if rules.max_tokens is not None:
            selection.drop_long(rules.max_tokens)
        selection.drop_duplicates()
        if rules.max_traces is not None:
            selection.drop_further_traces(rules.max_traces)
        selection.split(heldout_fraction, rules.heldout_frames)
        selection.require_some(selection.traces_in)
        selection.drop_further_heldout()
        if rules.overlap_words is not None or rules.overlap_masked:
            drop_overlaps(selection, rules.overlap_words, rules.overlap_masked, rules.benchmarks)
            selection.require_some(selection.traces_in)
        yield selection


def _read(source: Source, rules: TraceRules, selection: _Traces) -> None:
    """Add a source's traces.

    Raises:
        SchemaError: rows of another shape, or a rule's column has no value at all.
    """
    shape = _shape(source)
    before = dict(selection.known), selection.traces_in
    wanted = {**shape.wanted, **({"fault": None, "malformed": None} if source.is_text else {})}
    for batch in source.batches(wanted):
        with file_errors(batch.part.file):
            lines = shape.lines(batch)
            examples = _examples(lines, rules)
        selection.traces_in += int((lines.trace >= 0).sum())
        for name in selection.known:
            selection.known[name] += len(lines.row) - lines.facts[name].null_count
        selection.add(examples, len(batch))
    if selection.traces_in == before[1]:
        return
    for name in rules.levels_needed:
        if selection.known[name] == before[0][name]:
            raise _schema_error(
                source.types, f"no trace has a {name.upper()} level, but a rule on {name.upper()} is set"
            )
    if rules.teachers is not None and selection.known["teacher"] == before[0]["teacher"]:
        raise _schema_error(source.types, "no trace has a teacher, but teachers is set")


@dataclass(frozen=True)
class _Lines:
    """The traces of a batch, and a line for each row without any.

    Args:
        batch: the rows.
        row, trace: of each line, the row within the batch, and the trace within the row or -1.
        facts: rv, cd, teacher and is_verified of each line.
        question: the question of each row.
        given: the input of each row.
        output: gives the outputs of some lines, NOT_TEXT for what is no text.
        fault: why a line of a text file cannot be taken.
    """

    batch: Batch
    row: "np.ndarray[Any, Any]"
    trace: "np.ndarray[Any, Any]"
    facts: "dict[str, pa.Array]"
    question: "pa.Array"
    given: "pa.Array"
    output: "Callable[[np.ndarray[Any, Any]], pa.Array]"
    fault: "pa.Array | None" = None


@dataclass(frozen=True)
class _Shape:
    """How traces are read: which columns, of nested ones which leaves, and what a batch of these holds."""

    wanted: Mapping[str, Collection[str] | None]
    lines: Callable[[Batch], _Lines]


def _shape(source: Source) -> _Shape:
    types = source.types
    if "question" in types and "reasoning" in types:
        return _nested(source)
    if types.keys() & set(QUESTION_COLUMNS) and types.keys() & set(TRACE_COLUMNS):
        columns: dict[str, Collection[str] | None] = {name: None for name in FLAT_COLUMNS if name in types}
        return _Shape(columns | ({f"{VERIFIED}_given": None} if source.is_text else {}), _flat_lines)
    chat = chat_column(types)
    if chat is not None:
        facts: dict[str, Collection[str] | None] = {name: None for name in FLAT_FACTS if name in types}
        wanted = {chat: None, **facts} | ({f"{VERIFIED}_given": None} if source.is_text else {})
        return _Shape(wanted, lambda batch: _flat_lines(with_records(batch)))
    raise _schema_error(types, "expected question and reasoning, question and cot, or messages")


def _examples(lines: _Lines, rules: TraceRules) -> Examples:
    """Say of each trace why it is dropped, if it is; texts are looked at last, for they cost most."""
    import pyarrow as pa
    import pyarrow.compute as pc

    reasons = Reasons(len(lines.row))
    _drop_early(reasons, lines, rules)
    left = reasons.left()
    outputs = lines.output(left)
    instruction, given = asked_somewhere(lines.question, lines.given)
    rows = lines.row[left]
    for column in (lines.question, lines.given):
        reasons.drop("not text", left[is_not_text(column)[rows]])
    reasons.drop("not text", left[is_not_text(outputs)])
    for column in (instruction, given):
        reasons.drop("not writable text", left[has_nul(column)[rows]])
    reasons.drop("not writable text", left[has_nul(outputs)])
    reasons.drop("no instruction", left[is_blank(instruction)[rows]])
    reasons.drop("no output", left[is_blank(outputs)])
    chars = np.zeros(len(lines.row), np.int64)
    chars[left] = pc.utf8_length(outputs).to_numpy(zero_copy_only=False)
    is_read = np.zeros(len(lines.row), np.bool_)
    is_read[left] = True
    taken = reasons.left()
    output = outputs if len(taken) == len(left) else outputs.take(pa.array(np.searchsorted(left, taken)))
    used, of = np.unique(lines.row[taken], return_inverse=True)  # each question is read once
    asked = [column.take(pa.array(used)) for column in (instruction, given)]

    def shown_texts(at: int) -> dict[str, str | None]:
        row, found = lines.row[at], int(np.searchsorted(left, at))
        read = {"output": outputs[found]} if is_read[at] else {}
        return shown(instruction=instruction[row], input=given[row], **read)

    return Examples(
        reasons=reasons,
        row=lines.row,
        trace=lines.trace,
        facts={**lines.facts, "chars": pa.array(chars, mask=~is_read)},
        shown=shown_texts,
        instruction=asked[0].take(pa.array(of)),
        input=asked[1].take(pa.array(of)),
        output=output,
        text_id=question_ids(*asked)[of],
        output_id=identities(output),
        distance=_distances(lines, rules)[taken],
    )


def _distances(lines: _Lines, rules: TraceRules) -> "np.ndarray[Any, Any]":
    """Return how far each trace is from the levels looked for; NaN where a level is not known."""
    found = np.zeros(len(lines.row))
    for name, target in (("rv", rules.rv_target), ("cd", rules.cd_target)):
        if target is not None:
            found += np.abs(_floats(lines.facts[name]) - target)
    return found


def _floats(column: "pa.Array") -> "np.ndarray[Any, Any]":
    return column.to_numpy(zero_copy_only=False).astype(np.float64)


def _drop_early(reasons: Reasons, lines: _Lines, rules: TraceRules) -> None:
    """Drop what its facts decide alone."""
    import pyarrow as pa
    import pyarrow.compute as pc

    drop_faults(reasons, lines.fault)
    reasons.drop_where("no trace", lines.trace < 0)
    if rules.verified_only:
        verified = pc.fill_null(lines.facts["is_verified"], False)
        reasons.drop_where("not verified", ~verified.to_numpy(zero_copy_only=False))
    if rules.teachers is not None:
        kept = pc.is_in(lines.facts["teacher"], pa.array(rules.teachers, pa.large_string()))
        reasons.drop_where("other teacher", ~kept.to_numpy(zero_copy_only=False))
    for name in LEVELS:
        low, high = rules.bounds(name)
        if (low, high) != (None, None):
            level = _floats(lines.facts[name])
            reasons.drop_where("no level", np.isnan(level))
            is_out = (level < low) if low is not None else np.zeros(len(level), np.bool_)
            is_out = is_out | (level > high) if high is not None else is_out
            reasons.drop_where(f"{name.upper()} out of bounds", is_out)


def _flat_lines(batch: Batch) -> _Lines:
    import pyarrow as pa
    import pyarrow.compute as pc

    count, columns = len(batch), batch.columns

    def fact(read: Callable[..., "pa.Array"], name: str) -> "pa.Array":
        return read(columns[name], from_text=True) if name in columns else read(pa.nulls(count))

    verified = fact(marks, VERIFIED)
    given = columns.get(f"{VERIFIED}_given", columns[VERIFIED].is_valid() if VERIFIED in columns else None)
    unmarked = pa.array(np.ones(count, np.bool_)) if given is None else pc.invert(given)
    return _Lines(
        batch,
        row=np.arange(count),
        trace=np.zeros(count, np.int64),
        facts={
            "rv": fact(numbers, "rv_score"),
            "cd": fact(numbers, "cd_score"),
            "teacher": _teachers(columns.get("teacher"), count),
            "is_verified": pc.coalesce(verified, unmarked),
        },
        question=_first_filled(columns, QUESTION_COLUMNS, count),
        given=texts(columns["input"]) if "input" in columns else pa.nulls(count, pa.large_string()),
        output=lambda lines: _first_filled(columns, TRACE_COLUMNS, count).take(pa.array(lines)),
        fault=columns.get("fault"),
    )


def _teachers(column: "pa.Array | None", count: int) -> "pa.Array":
    import pyarrow as pa

    if column is None or not is_text(column.type):
        return pa.nulls(count, pa.large_string())
    return texts(column)


def _first_filled(columns: "dict[str, pa.Array]", names: Iterable[str], count: int) -> "pa.Array":
    """Return of each row the first of these texts that is not blank; NOT_TEXT where one is no text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pa.nulls(count, pa.large_string())
    for cell in [texts(columns[name]) for name in names if name in columns]:
        is_better = is_not_text(cell) | (is_blank(found) & ~is_blank(cell))
        found = pc.if_else(pa.array(is_better), cell, found)
    return found


def _nested(source: Source) -> _Shape:
    import pyarrow.types as pt

    types = source.types
    kind = types["reasoning"]
    if not (pt.is_list(kind) or pt.is_large_list(kind)):
        raise _schema_error(types, f"reasoning is {kind}, expected a list")
    if not pt.is_struct(kind.value_type):
        raise _schema_error(types, f"a trace is {kind.value_type}, expected an object")
    fields = [field.name for field in kind.value_type] if source.trace_keys is None else source.trace_keys
    if fields and not (RESPONSE in fields or set(STAND_INS) <= set(fields)):
        raise _schema_error(types, f"a trace has {named(sorted(fields))}; expected full_response")
    leaves = [*FACTS, RESPONSE] if RESPONSE in fields else [*FACTS, *STAND_INS]
    leaves += ["fault"] if source.is_text else []
    wanted: dict[str, Collection[str] | None] = {"question": None, "reasoning": leaves}
    return _Shape(wanted, lambda batch: _nested_lines(source, batch, VERIFIED in fields))


def _nested_lines(source: Source, batch: Batch, is_marked: bool) -> _Lines:
    import pyarrow as pa
    import pyarrow.compute as pc

    _require_well_formed(source, batch)
    reasoning = batch.columns["reasoning"]
    counts = pc.fill_null(pc.list_value_length(reasoning), 0).to_numpy(zero_copy_only=False)
    traces = reasoning.flatten()
    lines = np.maximum(counts, 1)  # a row without traces is a line too
    row = np.repeat(np.arange(len(batch)), lines)
    place = np.arange(len(row)) - np.repeat(lines.cumsum() - lines, lines)
    trace = np.where(np.repeat(counts > 0, lines), place, -1)
    at = np.full(len(row), -1)  # of the line's trace in `traces`
    at[trace >= 0] = np.arange(len(traces))
    taken, has_all = pa.array(at, mask=at < 0), bool((at >= 0).all())

    def fact(name: str, *within: str) -> "pa.Array":
        found = _field(traces, name, *within)
        found = pa.nulls(len(traces)) if found is None else found
        return found if has_all else found.take(taken)

    verified = marks(fact(VERIFIED)) if is_marked else pa.array(trace >= 0)
    return _Lines(
        batch,
        row,
        trace,
        facts={
            **{name: numbers(fact(column, "level")) for name, column in LEVELS.items()},
            "teacher": _teachers(fact("teacher"), len(row)),
            "is_verified": pc.fill_null(verified, False),
        },
        question=texts(batch.columns["question"]),
        given=pa.nulls(len(batch), pa.large_string()),
        output=lambda lines: _responses(source, batch, traces, at[lines]),
        fault=pc.coalesce(batch.columns["fault"].take(pa.array(row)), fact("fault").cast(pa.string()))
        if source.is_text
        else None,
    )


def _require_well_formed(source: Source, batch: Batch) -> None:
    malformed = batch.columns.get("malformed")
    if malformed is not None and malformed.null_count < len(malformed):
        raise _schema_error(source.types, malformed.drop_null()[0].as_py())


def _responses(source: Source, batch: Batch, traces: "pa.Array", at: "np.ndarray[Any, Any]") -> "pa.Array":
    """Return the full responses of some traces, thought and solution where that is blank."""
    import pyarrow as pa
    import pyarrow.compute as pc

    taken = pa.array(at)
    response = _field(traces, RESPONSE)
    found = pa.nulls(len(at), pa.large_string()) if response is None else texts(response.take(taken))
    blank = is_blank(found)
    if not blank.any():
        return found
    if response is not None:  # thought and solution were not read, for few traces need them
        traces = source.again(batch, {"reasoning": STAND_INS})["reasoning"].flatten()
    fields = [_field(traces, name) for name in STAND_INS]
    where = taken.filter(pa.array(blank))
    parts = [texts(field.take(where)).to_pylist() for field in fields if field is not None]
    stood_in = [_joined(some) for some in zip(*parts, strict=True)] or [""] * len(where)
    return pc.replace_with_mask(filled(found), pa.array(blank), pa.array(stood_in, pa.large_string()))


def _joined(parts: Sequence[str | None]) -> str:
    if NOT_TEXT in parts:
        return NOT_TEXT
    return "\n".join(part for part in parts if part is not None and part.strip())


def _field(traces: "pa.Array", name: str, *within: str) -> "pa.Array | None":
    """Return a field of structs, or a field within; None where there is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for step in (name, *within):
        if not pa.types.is_struct(traces.type) or traces.type.get_field_index(step) < 0:
            return None
        traces = pc.struct_field(traces, [traces.type.get_field_index(step)])
    return traces


def _schema_error(columns: Iterable[str], fault: str) -> SchemaError:
    return SchemaError(
        f"Unexpected OmniThought schema, please inspect omni[0] (columns: {named(columns)}): {fault}"
    )
