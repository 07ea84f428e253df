"""System 2: reasoning traces, nested as OmniThought has them or flat, one trace a row."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distill_app.core.errors import SchemaError
from distill_app.data.cells import (
    asked_somewhere,
    collapsed,
    is_blank,
    is_given,
    is_not_text,
    is_unwritable,
    json_cells,
    json_fault,
    number,
    text,
    truth,
)
from distill_app.data.engine import literal, named
from distill_app.data.selection import TRAIN, Outputs, Selection, case
from distill_app.data.sources import Source, open_source

QUESTION_COLUMNS = ("instruction", "question", "problem")
TRACE_COLUMNS = ("cot", "output", "response")
VERIFIED = "thought_correctness_verify"
LEVELS = {"rv": "Reasoning_Verbosity", "cd": "Cognitive_Difficulty"}
FLAT_COLUMNS = (*QUESTION_COLUMNS, *TRACE_COLUMNS, "input", "rv_score", "cd_score", VERIFIED, "teacher")
TRACE_FIELDS = ("full_response", "thought", "solution", VERIFIED, "teacher", *LEVELS.values())


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

    def __post_init__(self) -> None:
        for name in LEVELS:
            low, high = self.bounds(name)
            if low is not None and high is not None and low > high:
                raise ValueError(f"level bounds: {name}_min {low} is over {name}_max {high}; swap them")
        if self.max_traces is not None and self.max_traces < 1:
            raise ValueError(f"max_traces: found {self.max_traces}, expected 1 or more, or None for all")
        if self.max_tokens is not None and self.tokenizer is None:
            raise ValueError("max_tokens: no tokenizer to count with; name the student's in tokenizer")

    def bounds(self, level: str) -> tuple[int | None, int | None]:
        return getattr(self, f"{level}_min"), getattr(self, f"{level}_max")

    @property
    def levels_needed(self) -> list[str]:
        targets = {"rv": self.rv_target, "cd": self.cd_target}
        return [name for name in LEVELS if (*self.bounds(name), targets[name]) != (None, None, None)]


def prepare_traces(
    dataset: str,
    slice_str: str,
    revision: str | None,
    rules: TraceRules,
    heldout_fraction: float,
    seed: int,
    outputs: Outputs,
    threads: int | None = None,
) -> dict[str, Any]:
    """Write a slice's traces, training and held out (one a question), and return their counts.

    Records come by question, in dataset order; `output` is the full response, or thought and solution
    where that is empty. Of duplicates (the same output, to the letter, to the same question but for white
    space) the first stays. `dropped` counts traces by reason, but for "no trace" and what is wrong with a
    JSON row, which count rows.

    Raises:
        EmptyDataError: the slice has no rows, or no trace is left after selection.
        SchemaError: the columns are neither OmniThought's nor flat ones, or a rule's column has no value.
        OSError, ValueError: see `open_source`.
    """
    with _selected(dataset, slice_str, revision, rules, heldout_fraction, seed, threads) as selection:
        selection.write(outputs, seed)
        summary = selection.summary()
        questions = selection.database.one(
            "SELECT count(DISTINCT key) FROM examples JOIN texts USING (text_id)"
            f" WHERE reason IS NULL AND side = {TRAIN}"
        )
    counts = {"rows_in": selection.rows_in, "traces_in": selection.traces_in, "train_questions": questions}
    return {**counts, **summary}


def explain_traces(
    dataset: str,
    slice_str: str,
    revision: str | None,
    rules: TraceRules,
    heldout_fraction: float,
    seed: int,
    row: int,
) -> list[str]:
    """Return what becomes of each trace of a row, and which rule took it; nothing is written."""
    with _selected(dataset, slice_str, revision, rules, heldout_fraction, seed) as selection:
        return selection.explain(row)


class _Traces(Selection):
    traces_in = 0


@contextmanager
def _selected(
    dataset: str,
    slice_str: str,
    revision: str | None,
    rules: TraceRules,
    heldout_fraction: float,
    seed: int,
    threads: int | None = None,
) -> Iterator[_Traces]:
    with open_source(dataset, slice_str, revision, threads) as source:
        shape = _shape(source)
        selection = _Traces(source, _staging(shape, rules), shape.question)
        _require_schema(selection, rules)
        if rules.tokenizer is not None:
            selection.count_tokens(rules.tokenizer, "system2")
        if rules.max_tokens is not None:
            selection.drop("over max_tokens", f"SELECT n FROM taken WHERE tokens > {rules.max_tokens}")
        selection.drop_duplicates()
        if rules.max_traces is not None:
            place = "row_number() OVER (PARTITION BY text_id ORDER BY distance NULLS LAST, chars, n)"
            selection.drop("over max_traces", f"SELECT n FROM taken QUALIFY {place} > {rules.max_traces}")
        selection.split(heldout_fraction, seed)
        selection.require_some(selection.traces_in)
        selection.drop_further_heldout()
        yield selection


def _require_schema(selection: _Traces, rules: TraceRules) -> None:
    """Raise SchemaError for rows of another shape, or if a rule's column has no value at all."""
    facts = (*LEVELS, "teacher")
    traces, malformed, *found = selection.database.over(
        selection.staged.read("trace", "fault", *facts),
        f"SELECT count(trace), min(fault), {', '.join(f'count({name})' for name in facts)} FROM found",
    )[0]
    selection.traces_in = traces
    columns = selection.source.types
    if malformed is not None:
        raise _schema_error(columns, malformed)
    counts = dict(zip(facts, found, strict=True))
    for name in rules.levels_needed:
        if traces and not counts[name]:
            raise _schema_error(
                columns, f"no trace has a {name.upper()} level, but a rule on {name.upper()} is set"
            )
    if rules.teachers is not None and traces and not counts["teacher"]:
        raise _schema_error(columns, "no trace has a teacher, but teachers is set")


@dataclass(frozen=True)
class _Shape:
    """How traces are read: SQL with a line for each trace, and what its cells say, as SQL over that.

    Args:
        lines: row, trace (null where a row has none), row_fault (a reject) and fault (an error).
        question: SQL for row and instruction of all rows, without their traces.
    """

    lines: str
    question: str
    instruction: str
    input: str
    output: str
    is_not_text: str
    is_verified: str
    teacher: str
    rv: str
    cd: str


def _shape(source: Source) -> _Shape:
    types = source.types
    if "question" in types and "reasoning" in types:
        return _nested_json(source) if source.is_json else _nested_parquet(source)
    if types.keys() & set(QUESTION_COLUMNS) and types.keys() & set(TRACE_COLUMNS):
        return _flat(source)
    raise _schema_error(types, "expected question and reasoning, or question and cot")


def _staging(shape: _Shape, rules: TraceRules) -> str:
    """Return SQL that says of each trace why it is dropped; texts are looked at last, for they cost most."""
    facts = ", ".join(f"{getattr(shape, name)} AS {name}" for name in ("rv", "cd", "teacher", "is_verified"))
    texts = ", ".join(
        f"CASE WHEN early IS NULL THEN {getattr(shape, name)} END AS {name}"
        for name in ("instruction", "input", "output", "is_not_text")
    )
    targets = {"rv": rules.rv_target, "cd": rules.cd_target}
    gaps = [f"abs({name} - {target})" for name, target in targets.items() if target is not None]
    early = f"SELECT *, {case(_early_checks(rules))} AS early FROM (SELECT *, {facts} FROM ({shape.lines}))"
    read = f"SELECT row, trace, fault, rv, cd, teacher, is_verified, early, {texts} FROM ({early})"
    return (
        f"SELECT row, trace, coalesce(early, {case(LATE_CHECKS)}) AS reason, fault, rv, cd, teacher,"
        " is_verified, length(output) AS chars,"
        f" hash({collapsed('instruction')}, {collapsed('input')}) AS text_id,"
        f" hash(output) AS output_id, ({' + '.join(gaps) or '0'})::DOUBLE AS distance,"
        " strlen(instruction) + strlen(input) + strlen(output) AS bytes,"
        " instruction, input, output"
        f" FROM ({asked_somewhere(read)})"
    )


LATE_CHECKS = (
    ("is_not_text", "'not text'"),
    (" OR ".join(map(is_unwritable, ("instruction", "input", "output"))), "'not writable text'"),
    (is_blank("instruction"), "'no instruction'"),
    (is_blank("output"), "'no output'"),
)


def _early_checks(rules: TraceRules) -> list[tuple[str, str]]:
    checks = [("row_fault IS NOT NULL", "row_fault"), ("trace IS NULL", "'no trace'")]
    if rules.verified_only:
        checks.append(("NOT is_verified", "'not verified'"))
    if rules.teachers is not None:
        kept = f"list_contains({literal(rules.teachers)}, teacher)"
        checks.append((f"NOT coalesce({kept}, false)", "'other teacher'"))
    for name in LEVELS:
        low, high = rules.bounds(name)
        out = [f"{name} < {low}"] * (low is not None) + [f"{name} > {high}"] * (high is not None)
        if out:
            checks += [
                (f"{name} IS NULL", "'no level'"),
                (" OR ".join(out), f"'{name.upper()} out of bounds'"),
            ]
    return checks


def _flat(source: Source) -> _Shape:
    types = source.types

    def first(columns: tuple[str, ...]) -> str:
        cells = [text(f'"{name}"', types[name]) for name in columns if name in types]
        return f"coalesce({', '.join(f'CASE WHEN NOT {is_blank(cell)} THEN {cell} END' for cell in cells)})"

    read = [name for name in (*QUESTION_COLUMNS, *TRACE_COLUMNS, "input") if name in types]
    mark = f'"{VERIFIED}"', types.get(VERIFIED)
    verified = f"coalesce({truth(*mark, from_text=True)}, NOT {is_given(*mark)})"
    instruction = first(QUESTION_COLUMNS)
    renamed = "fault AS row_fault, teacher AS wrote" + (", teacher_kind AS wrote_kind" * source.is_json)
    return _Shape(
        lines=f"SELECT * RENAME ({renamed}), 0 AS trace, NULL::VARCHAR AS fault"
        f" FROM ({source.rows(FLAT_COLUMNS)})",
        question=f"SELECT row, {instruction} AS instruction FROM ({source.rows(QUESTION_COLUMNS)})",
        instruction=instruction,
        input=text("input", types.get("input")),
        output=first(TRACE_COLUMNS),
        is_not_text=" OR ".join(is_not_text(f'"{name}"', types[name]) for name in read),
        is_verified=verified,
        teacher=text("wrote", types.get("teacher")),
        rv=number("rv_score", types.get("rv_score"), from_text=True),
        cd=number("cd_score", types.get("cd_score"), from_text=True),
    )


def _nested_parquet(source: Source) -> _Shape:
    import pyarrow.types as pt

    types = source.types
    kind = types["reasoning"]
    if not (pt.is_list(kind) or pt.is_large_list(kind)):
        raise _schema_error(types, f"reasoning is {kind}, expected a list")
    if not pt.is_struct(kind.value_type):
        raise _schema_error(types, f"a trace is {kind.value_type}, expected an object")
    fields = {field.name: field.type for field in kind.value_type}
    _require_trace_fields(types, fields)
    levels = {}
    for name, column in LEVELS.items():
        level = fields.get(column)
        within = {f.name: f.type for f in level} if level is not None and pt.is_struct(level) else {}
        levels[name] = number(f't."{column}"."level"', within.get("level"))
    cells = {name: (f't."{name}"', fields.get(name)) for name in TRACE_FIELDS}
    some = "len(reasoning) > 0"
    lines = (
        "SELECT row, question, fault AS row_fault, NULL::VARCHAR AS fault,"
        f" unnest(CASE WHEN {some} THEN reasoning ELSE [NULL] END) AS t,"
        f" unnest(CASE WHEN {some} THEN range(len(reasoning)) ELSE [NULL] END) AS trace"
        f" FROM ({source.rows(['question', 'reasoning'])})"
    )
    return _nested(source, lines, cells, levels)


def _nested_json(source: Source) -> _Shape:
    import pyarrow as pa

    known = source.keys_within("reasoning")
    if known:
        _require_trace_fields(source.types, known)
    fields = {name: f'$."{name}"' for name in TRACE_FIELDS}
    fields |= {name: f'$."{column}"."level"' for name, column in LEVELS.items()}
    cells = {name: (f'"{name}"', pa.json_() if name in known else None) for name in TRACE_FIELDS}
    cells["teacher"] = ("wrote", cells["teacher"][1])
    levels = {name: number(f"{name}_level", pa.json_()) for name in LEVELS}
    named = [{"teacher": "wrote", "rv": "rv_level", "cd": "cd_level"}.get(name, name) for name in fields]
    some = "reasoning_kind = 'ARRAY' AND json_array_length(reasoning) > 0"
    rows = (
        "SELECT * RENAME (fault AS whole_fault),"
        f" unnest(CASE WHEN {some} THEN json_extract(reasoning, '$[*]') ELSE [NULL] END) AS t,"
        f" unnest(CASE WHEN {some} THEN range(json_array_length(reasoning)::BIGINT) ELSE [NULL] END) AS trace"
        f" FROM ({source.rows(['question', 'reasoning'])})"
    )
    faults = (
        (
            "reasoning_kind <> 'ARRAY' AND reasoning_kind <> 'NULL'",
            "'reasoning is ' || lower(reasoning_kind) || ', expected a list'",
        ),
        ("json_type(t) <> 'OBJECT'", "'a trace is ' || lower(json_type(t)) || ', expected an object'"),
    )
    wrong = f"CASE WHEN trace IS NOT NULL THEN {json_fault('t')} END"
    lines = (
        "SELECT * EXCLUDE (t, reasoning, reasoning_kind, whole_fault),"
        f" {case(faults)} AS fault, coalesce(whole_fault, {wrong}) AS row_fault"
        f" FROM ({json_cells('t', named, list(fields.values()))} ({rows})))"
    )
    return _nested(source, lines, cells, levels)


def _require_trace_fields(columns: Iterable[str], found: Collection[str]) -> None:
    if not ("full_response" in found or {"thought", "solution"} <= set(found)):
        raise _schema_error(columns, f"a trace has {named(found)}; expected full_response")


def _nested(source: Source, lines: str, cells: dict[str, tuple[str, Any]], levels: dict[str, str]) -> _Shape:
    kind = source.types["question"]
    question = text("question", kind)
    response, thought, solution = (text(*cells[name]) for name in ("full_response", "thought", "solution"))
    parts = ", ".join(f"CASE WHEN NOT {is_blank(part)} THEN {part} END" for part in (thought, solution))
    stand_in = " OR ".join(is_not_text(*cells[name]) for name in ("thought", "solution"))
    faults = [is_not_text("question", kind), is_not_text(*cells["full_response"])]
    verified = truth(*cells[VERIFIED])
    return _Shape(
        lines=lines,
        question=f"SELECT row, {question} AS instruction FROM ({source.rows(['question'])})",
        instruction=question,
        input="''",
        output=f"CASE WHEN {is_blank(response)} THEN concat_ws(e'\\n', {parts}) ELSE {response} END",
        is_not_text=f"{' OR '.join(faults)} OR ({is_blank(response)} AND ({stand_in}))",
        is_verified="true" if cells[VERIFIED][1] is None else f"coalesce({verified}, false)",
        teacher=text(*cells["teacher"]),
        rv=levels["rv"],
        cd=levels["cd"],
    )


def _schema_error(columns: Any, fault: str) -> SchemaError:
    return SchemaError(
        f"Unexpected OmniThought schema, please inspect omni[0] (columns: {named(columns)}): {fault}"
    )
