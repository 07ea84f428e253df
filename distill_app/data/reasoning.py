"""System 2: reasoning traces, nested as OmniThought has them or flat, one trace a row."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from distill_app.core.errors import SchemaError
from distill_app.core.files import Record
from distill_app.data.heldout import first_of_each_text, split_heldout
from distill_app.data.sources import Selection, iter_rows, require_records, writable_text

QUESTION_COLUMNS = ("instruction", "question", "problem")
TRACE_COLUMNS = ("cot", "output", "response")
VERIFIED = "thought_correctness_verify"


@dataclass(frozen=True)
class LevelBounds:
    """Inclusive bounds of an annotated level, 0 to 9; None leaves a side open."""

    min: int | None = None
    max: int | None = None

    def __post_init__(self) -> None:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"level bounds: minimum {self.min} is over maximum {self.max}; swap them")

    @property
    def is_set(self) -> bool:
        return self.min is not None or self.max is not None

    def allow(self, level: float) -> bool:
        return (self.min is None or level >= self.min) and (self.max is None or level <= self.max)


@dataclass(frozen=True)
class _Trace:
    instruction: Any
    input: Any
    output: Any
    parts: tuple[Any, Any]  # thought and solution, which stand in for an empty output
    is_verified: bool
    rv: float | None
    cd: float | None


@dataclass
class _Pass:
    """What one pass over the rows has counted and kept so far."""

    rv: LevelBounds
    cd: LevelBounds
    verified_only: bool
    max_traces: int | None
    rows_in: int = 0
    traces_in: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    levels_seen: Counter[str] = field(default_factory=Counter)
    kept: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # outputs by question


def prepare_traces(
    dataset: str,
    slice_str: str,
    revision: str | None,
    rv_min: int | None,
    rv_max: int | None,
    cd_min: int | None,
    cd_max: int | None,
    verified_only: bool,
    max_traces: int | None,
    heldout_fraction: float,
    seed: int,
) -> tuple[list[Record], list[Record], dict[str, Any]]:
    """Load a slice of questions and return (train, heldout, metrics); heldout has one record each.

    Raises:
        EmptyDataError: the slice has no rows, or no trace is left after selection.
        SchemaError: the columns are neither OmniThought's nor flat ones, or a bound has no levels.
        OSError, ValueError: see `load_rows`.
    """
    rv, cd = LevelBounds(rv_min, rv_max), LevelBounds(cd_min, cd_max)
    rows = iter_rows(dataset, slice_str, revision)
    selection = select_traces(rows, rv, cd, verified_only, max_traces)
    require_records(selection, dataset, slice_str)
    train, heldout = split_heldout(selection.records, heldout_fraction, seed)
    questions = first_of_each_text(heldout)
    dropped = dict(selection.dropped)
    if len(questions) < len(heldout):
        dropped["further trace of a held-out question"] = len(heldout) - len(questions)
    metrics = {
        "rows_in": selection.rows_in,
        "traces_in": selection.traces_in,
        "train": len(train),
        "train_questions": len(first_of_each_text(train)),
        "heldout": len(questions),
        "dropped": dict(sorted(dropped.items())),
    }
    return train, questions, metrics


def select_traces(
    rows: Iterable[Mapping[str, Any]],
    rv: LevelBounds,
    cd: LevelBounds,
    verified_only: bool = True,
    max_traces: int | None = None,
) -> Selection:
    """Take the traces whose verbosity (RV) and difficulty (CD) the student can follow.

    One pass that holds the kept traces alone. Records come by question, in dataset order; `output`
    is the full response, or thought and solution where that is empty. `dropped` counts traces by
    reason, but for "no trace", which counts rows.

    Args:
        verified_only: drop what was found wrong, and of nested traces what nobody checked. Where there
            is no such column at all, every trace stays.
        max_traces: the number of shortest traces (in characters) kept a question.

    Raises:
        SchemaError: columns that are neither OmniThought's nor flat ones; or a bound is set and no
            trace has that level.

    Source: RV/CD selection, arXiv:2505.10937, section 4.
    """
    if max_traces is not None and max_traces < 1:
        raise ValueError(f"max_traces: found {max_traces}, expected 1 or more, or None for all")
    state = _Pass(rv, cd, verified_only, max_traces)
    columns: list[str] = []
    for row in rows:
        columns = columns or list(row)
        state.rows_in += 1
        traces_before = state.traces_in
        for trace in _traces_of(row):
            state.traces_in += 1
            _take(state, trace)
        if state.traces_in == traces_before:
            state.dropped["no trace"] += 1
    for name, bounds in (("RV", rv), ("CD", cd)):
        if bounds.is_set and state.traces_in and not state.levels_seen[name]:
            raise _schema_error(columns, f"no trace has a {name} level, but a {name} bound is set")
    records = [
        {"instruction": instruction, "input": input_text, "output": output}
        for (instruction, input_text), outputs in state.kept.items()
        for output in outputs
    ]
    return Selection(records, state.rows_in, dict(sorted(state.dropped.items())), state.traces_in)


def _take(state: _Pass, trace: _Trace) -> None:
    state.levels_seen["RV"] += trace.rv is not None
    state.levels_seen["CD"] += trace.cd is not None
    try:
        _require_wanted(state, trace)
        record = _as_record(trace)
    except ValueError as reason:
        state.dropped[str(reason)] += 1
        return
    outputs = state.kept.setdefault((record["instruction"], record["input"]), [])
    if record["output"] in outputs:
        state.dropped["duplicate"] += 1
        return
    outputs.append(record["output"])
    if state.max_traces is not None and len(outputs) > state.max_traces:
        longest = max(range(len(outputs)), key=lambda i: (len(outputs[i]), i))
        outputs.pop(longest)
        state.dropped["over max_traces"] += 1


def _require_wanted(state: _Pass, trace: _Trace) -> None:
    """Raises ValueError with the reason to drop the trace."""
    if state.verified_only and not trace.is_verified:
        raise ValueError("not verified")
    for name, bounds, level in (("RV", state.rv, trace.rv), ("CD", state.cd, trace.cd)):
        if not bounds.is_set:
            continue
        if level is None:
            raise ValueError("no level")
        if not bounds.allow(level):
            raise ValueError(f"{name} out of bounds")


def _as_record(trace: _Trace) -> Record:
    """Raises ValueError with the reason to drop the trace."""
    instruction, input_text = writable_text(trace.instruction), writable_text(trace.input)
    if not instruction.strip():
        instruction, input_text = input_text, ""
    if not instruction.strip():
        raise ValueError("no instruction")
    output = writable_text(trace.output)
    if not output.strip():
        output = "\n".join(filter(str.strip, map(writable_text, trace.parts)))
    if not output:
        raise ValueError("no output")
    return {"instruction": instruction, "input": input_text, "output": output}


def _traces_of(row: Mapping[str, Any]) -> Iterator[_Trace]:
    if "question" in row and "reasoning" in row:
        yield from _nested_traces(row)
    elif any(name in row for name in QUESTION_COLUMNS) and any(name in row for name in TRACE_COLUMNS):
        yield _Trace(
            instruction=_first_filled(row, QUESTION_COLUMNS),
            input=row.get("input"),
            output=_first_filled(row, TRACE_COLUMNS),
            parts=(None, None),
            is_verified=row.get(VERIFIED) in (True, None),
            rv=_level(row.get("rv_score")),
            cd=_level(row.get("cd_score")),
        )
    else:
        raise _schema_error(row, "expected question and reasoning, or question and cot")


def _nested_traces(row: Mapping[str, Any]) -> Iterator[_Trace]:
    reasoning = row["reasoning"]
    if reasoning is None:
        return
    if not isinstance(reasoning, list):
        raise _schema_error(row, f"reasoning is {type(reasoning).__name__}, expected a list")
    for item in reasoning:
        if not isinstance(item, Mapping):
            raise _schema_error(row, f"a trace is {type(item).__name__}, expected an object")
        if not ("full_response" in item or {"thought", "solution"} <= set(item)):
            raise _schema_error(row, f"a trace has {', '.join(item)}; expected full_response")
        yield _Trace(
            instruction=row["question"],
            input=None,
            output=item.get("full_response"),
            parts=(item.get("thought"), item.get("solution")),
            is_verified=item.get(VERIFIED, True) is True,
            rv=_nested_level(item.get("Reasoning_Verbosity")),
            cd=_nested_level(item.get("Cognitive_Difficulty")),
        )


def _first_filled(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    values = (row.get(name) for name in names)
    return next((v for v in values if v is not None and not (isinstance(v, str) and not v.strip())), None)


def _nested_level(annotation: Any) -> float | None:
    return _level(annotation.get("level")) if isinstance(annotation, Mapping) else None


def _level(value: Any) -> float | None:
    """Return a number as it is; None for null, not-a-number, and other types."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and value == value else None


def _schema_error(columns: Iterable[str], fault: str) -> SchemaError:
    names = ", ".join(columns) or "none"
    return SchemaError(f"Unexpected OmniThought schema, please inspect omni[0] (columns: {names}): {fault}")
