"""Hostile rows and damaged files: what comes of them equals a plain reference, or is one error with a name.

FUZZ_EXAMPLES=2000 pytest -n 0 tests/test_data_fuzz.py     # more examples, new ones each time
"""

import json
import math
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from selections import Selected, prepared

from distill_app.core.errors import EmptyDataError, SchemaError
from distill_app.data.instructions import InstructionRules, prepare_instructions
from distill_app.data.reasoning import TraceRules, prepare_traces

FIXED = 40 if os.environ.get("CI") == "true" else 10
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", FIXED))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == FIXED,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
ODD = [
    "",
    " ",
    "\0",
    "a\0b",
    "\x01\x1f\x7f",
    "\u200b",
    "\u202eرد\u202c",
    "שלום\u200f",
    "\u3000\x85\x1c",
    "a",
    "A ",
]
TEXT = st.sampled_from(ODD) | st.text(st.characters(codec="utf-8"), max_size=6)
SCALAR = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | TEXT | st.just("x" * 70_000)
)
VALUE = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2)
)
LEVEL = st.one_of(st.integers(0, 9), st.integers(0, 9), SCALAR)
LEVELS = st.fixed_dictionaries({"level": LEVEL}, optional={"judge": TEXT}) | SCALAR


def usual(value: st.SearchStrategy, odd: st.SearchStrategy = VALUE) -> st.SearchStrategy:
    return st.one_of(value, value, value, odd)


INSTRUCTION = st.fixed_dictionaries(
    {"instruction": usual(TEXT)}, optional={"input": usual(TEXT), "output": usual(TEXT), "x": VALUE}
)
TRACE = st.fixed_dictionaries(
    {"full_response": usual(TEXT)},
    optional={
        "thought": usual(TEXT),
        "solution": usual(TEXT),
        "thought_correctness_verify": usual(st.booleans() | st.sampled_from([0, 1, 0.0, 1.0, 2])),
        "Reasoning_Verbosity": LEVELS,
        "Cognitive_Difficulty": LEVELS,
        "teacher": usual(st.sampled_from(["r", "q"])),
    },
)
QUESTION = st.fixed_dictionaries(
    {"question": usual(TEXT), "reasoning": st.none() | st.lists(TRACE, max_size=4)}, optional={"x": VALUE}
)


def is_writable(text: str) -> bool:
    return "\0" not in text


def plain_instructions(rows: list) -> tuple[list[dict], Counter[str]]:
    kept: dict[tuple, dict] = {}
    dropped: Counter[str] = Counter()
    for row in rows:
        if not isinstance(row, dict):
            dropped["not an object"] += 1
            continue
        cells = [row.get(name) for name in ("instruction", "input", "output")]
        if not all(cell is None or isinstance(cell, str) for cell in cells):
            dropped["not text"] += 1
            continue
        instruction, given, output = (cell or "" for cell in cells)
        if not instruction.strip():
            instruction, given = given, ""
        if not all(map(is_writable, (instruction, given, output))):
            dropped["not writable text"] += 1
        elif not instruction.strip():
            dropped["no instruction"] += 1
        elif (key := (" ".join(instruction.split()), " ".join(given.split()))) in kept:
            dropped["duplicate"] += 1
        else:
            kept[key] = {"instruction": instruction, "input": given, "output": output}
    return list(kept.values()), dropped


def level_of(trace: dict, name: str) -> float | None:
    annotation = trace.get(name)
    value = annotation.get("level") if isinstance(annotation, dict) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and not math.isnan(value) else None


def plain_reason(question: Any, trace: dict, is_marked: bool, rules: TraceRules) -> str | tuple[str, str]:
    """Return the reason to drop a trace, or its instruction and output."""
    if rules.verified_only and is_marked and trace.get("thought_correctness_verify") != 1:  # nor true
        return "not verified"
    for name, column in (("rv", "Reasoning_Verbosity"), ("cd", "Cognitive_Difficulty")):
        low, high = rules.bounds(name)
        level = level_of(trace, column)
        if (low, high) != (None, None):
            if level is None:
                return "no level"
            if (low is not None and level < low) or (high is not None and level > high):
                return f"{name.upper()} out of bounds"
    response = trace.get("full_response")
    parts = [trace.get("thought"), trace.get("solution")]
    cells = [question, response] + (parts if not isinstance(response, str) or not response.strip() else [])
    if not all(cell is None or isinstance(cell, str) for cell in cells):
        return "not text"
    if response is None or not response.strip():
        response = "\n".join(part for part in parts if part and part.strip())
    if not is_writable(question or "") or not is_writable(response):
        return "not writable text"
    if not (question or "").strip():
        return "no instruction"
    return (question, response) if response.strip() else "no output"


def plain_traces(rows: list, rules: TraceRules) -> tuple[list[dict], Counter[str]]:
    kept: dict[str, dict[str, str]] = {}
    dropped: Counter[str] = Counter()
    is_marked = any("thought_correctness_verify" in t for row in rows for t in row["reasoning"] or ())
    for row in rows:
        if not row["reasoning"]:
            dropped["no trace"] += 1
        for trace in row["reasoning"] or ():
            found = plain_reason(row["question"], trace, is_marked, rules)
            if isinstance(found, str):
                dropped[found] += 1
            elif found[1] in kept.setdefault(" ".join(found[0].split()), {}):
                dropped["duplicate"] += 1
            else:
                kept[" ".join(found[0].split())][found[1]] = found[0]
    records = []
    for outputs in kept.values():
        best = sorted(outputs, key=len)[: rules.max_traces]
        dropped["over max_traces"] += len(outputs) - len(best)
        records += [
            {"instruction": question, "input": "", "output": text}
            for text, question in outputs.items()
            if text in best
        ]
    return records, +dropped


def run(prepare: Any, name: str, content: bytes, rules: Any) -> Selected | Exception:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            return prepared(prepare, path, "train", rules, folder=Path(folder) / "out")
        except (ValueError, OSError) as err:
            assert "\n" not in str(err) and (name in str(err) or "schema" in str(err)), err
            return err


def as_json(rows: list, is_list: bool) -> tuple[str, bytes]:
    if is_list:
        return "rows.json", json.dumps(rows, ensure_ascii=False).encode()
    return "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()


@FUZZ
@given(st.lists(usual(INSTRUCTION), min_size=1, max_size=8), st.booleans())
def test_any_json_rows_give_the_instructions_of_a_plain_reference(rows: list, is_list: bool) -> None:
    if not is_list:
        rows = [row for row in rows if isinstance(row, dict)]
    found = run(prepare_instructions, *as_json(rows, is_list), InstructionRules())
    expected, dropped = plain_instructions(rows)
    if not any(isinstance(row, dict) and "instruction" in row for row in rows):
        assert isinstance(found, SchemaError | EmptyDataError) or not isinstance(rows[0], dict)
    elif not expected:
        assert isinstance(found, EmptyDataError)
        assert all(f"{count} {reason}" in str(found) for reason, count in dropped.items())
    else:
        assert isinstance(found, Selected), found
        assert found.train == expected and found.dropped == dropped


@FUZZ
@given(
    st.lists(QUESTION, min_size=1, max_size=6),
    st.booleans(),
    st.builds(
        TraceRules,
        rv_max=st.none() | st.integers(0, 9),
        cd_min=st.none() | st.integers(0, 9),
        verified_only=st.booleans(),
        max_traces=st.none() | st.integers(1, 3),
    ),
)
def test_any_json_rows_give_the_traces_of_a_plain_reference(
    rows: list, is_list: bool, rules: TraceRules
) -> None:
    found = run(prepare_traces, *as_json(rows, is_list), rules)
    if isinstance(found, SchemaError):
        levels = {"rv": "Reasoning_Verbosity", "cd": "Cognitive_Difficulty"}
        traces = [trace for row in rows for trace in row["reasoning"] or ()]
        assert any(all(level_of(t, levels[name]) is None for t in traces) for name in rules.levels_needed)
        return
    expected, dropped = plain_traces(rows, rules)
    if not expected:
        assert isinstance(found, EmptyDataError)
        assert all(f"{count} {reason}" in str(found) for reason, count in dropped.items())
    else:
        assert isinstance(found, Selected), found
        assert found.train == expected and found.dropped == dropped


@FUZZ
@given(st.lists(st.tuples(st.none() | TEXT, st.none() | TEXT, st.none() | TEXT), min_size=1, max_size=8))
def test_any_parquet_texts_give_the_instructions_of_a_plain_reference(rows: list) -> None:
    table = [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in rows]
    content = pa.BufferOutputStream()
    schema = pa.schema([(name, pa.string()) for name in table[0]])
    pq.write_table(pa.Table.from_pylist(table, schema), content)
    found = run(prepare_instructions, "rows.parquet", content.getvalue().to_pybytes(), InstructionRules())
    expected, dropped = plain_instructions(table)
    if expected:
        assert isinstance(found, Selected) and found.train == expected and found.dropped == dropped
    else:
        assert isinstance(found, EmptyDataError)


def a_file(kind: str) -> bytes:
    rows = [{"question": f"q{n}", "cot": f"answer {n} " * 20, "rv_score": n % 10} for n in range(50)]
    if kind == "parquet":
        content = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), content, row_group_size=20)
        return content.getvalue().to_pybytes()
    if kind == "csv":
        return (
            "question,cot,rv_score\n" + "".join(f'"{r["question"]}","{r["cot"]}",3\n' for r in rows)
        ).encode()
    return as_json(rows, kind == "json")[1]


@pytest.mark.parametrize("kind", ["parquet", "json", "jsonl", "csv"])
@FUZZ
@given(
    st.lists(st.tuples(st.floats(0, 0.999), st.binary(max_size=4)), min_size=1, max_size=3),
    st.floats(0.01, 1) | st.just(1.0),
)
def test_a_damaged_file_is_read_as_it_stands_or_is_one_error_with_its_name(
    kind: str, wounds: list, kept: float
) -> None:
    content = bytearray(a_file(kind))
    for place, new in wounds:
        at = int(place * len(content))
        content[at : at + len(new)] = new
    found = run(prepare_traces, f"rows.{kind}", bytes(content[: int(kept * len(content))]), TraceRules())
    if isinstance(found, Selected):
        metrics = found.metrics
        assert metrics["kept"] + sum(metrics["dropped"].values()) == metrics["rows_in"]
        assert metrics["kept"] == len(found.train)
