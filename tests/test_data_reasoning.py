"""System 2 traces are chosen by level, verification and length, and every other one is counted."""

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from distill_app.core.errors import EmptyDataError, SchemaError
from distill_app.core.files import Record
from distill_app.data.heldout import overlap
from distill_app.data.params import PrepareS2Params
from distill_app.data.reasoning import LevelBounds, prepare_traces, select_traces

SAMPLE = str(Path(__file__).resolve().parents[1] / "data" / "sample" / "OmniThought")
OPEN = LevelBounds()
SCHEMA = r"^Unexpected OmniThought schema, please inspect omni\[0\] \(columns: "


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_dir = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache_dir)


def trace(output: str | None = "ok", rv: object = 3, cd: object = 3, ok: object = True) -> dict:
    return {
        "thought": "think",
        "solution": "solve",
        "full_response": output,
        "teacher": "QwQ-32B",
        "thought_correctness_verify": ok,
        "Reasoning_Verbosity": {"judge": "j", "level": rv},
        "Cognitive_Difficulty": {"judge": "j", "level": cd},
    }


def question(*traces: dict, text: object = "Why?") -> dict:
    return {"question": text, "reasoning": list(traces)}


def outputs(records: list[Record]) -> list[str]:
    return [record["output"] for record in records]


def prepare(dataset: str = SAMPLE, **changes: object) -> tuple[list[Record], list[Record], dict]:
    arguments = {
        "slice_str": "train[:100]",
        "revision": None,
        "rv_min": None,
        "rv_max": None,
        "cd_min": None,
        "cd_max": None,
        "verified_only": True,
        "max_traces": None,
        "heldout_fraction": 0.1,
        "seed": 0,
    }
    return prepare_traces(dataset, **{**arguments, **changes})


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (None, None, "0123456789"),
        (4, None, "456789"),
        (None, 4, "01234"),
        (3, 5, "345"),
        (0, 0, "0"),
        (9, 9, "9"),
    ],
)
@pytest.mark.parametrize("name", ["rv", "cd"])
def test_the_bounds_of_both_levels_are_inclusive(
    name: str, low: int | None, high: int | None, expected: str
) -> None:
    rows = [question(*(trace(str(level), **{name: level}) for level in range(10)))]
    bounds = {"rv": OPEN, "cd": OPEN, name: LevelBounds(low, high)}
    selection = select_traces(rows, **bounds)
    assert outputs(selection.records) == list(expected)
    out = 10 - len(expected)
    assert selection.dropped == ({f"{name.upper()} out of bounds": out} if out else {})


def test_bounds_that_hold_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="minimum 5 is over maximum 4"):
        LevelBounds(5, 4)


@pytest.mark.parametrize("level", [None, "3", True, math.nan, [3]])
def test_a_trace_without_a_level_is_dropped_where_a_bound_needs_it(level: object) -> None:
    rows = [question(trace("has"), trace("has not", rv=level))]
    selection = select_traces(rows, LevelBounds(None, 9), OPEN)
    assert outputs(selection.records) == ["has"]
    assert selection.dropped == {"no level": 1}
    assert len(select_traces(rows, OPEN, LevelBounds(0)).records) == 2


@pytest.mark.parametrize(("name", "field"), [("RV", "rv"), ("CD", "cd")])
def test_a_bound_on_a_level_that_no_trace_has_is_a_schema_error(name: str, field: str) -> None:
    bounds = {"rv": OPEN, "cd": OPEN, field: LevelBounds(0)}
    flat = [{"question": "a", "cot": "b"}]
    for rows in ([question(trace(**{field: None}))], flat):
        with pytest.raises(SchemaError, match=SCHEMA + f".*no trace has a {name} level"):
            select_traces(rows, **bounds)


@pytest.mark.parametrize("mark", [False, None])
def test_a_nested_trace_that_is_wrong_or_unchecked_goes_unless_all_are_wanted(mark: object) -> None:
    rows = [question(trace("right"), trace("other", ok=mark))]
    selection = select_traces(rows, OPEN, OPEN)
    assert outputs(selection.records) == ["right"]
    assert selection.dropped == {"not verified": 1}
    every = select_traces(rows, OPEN, OPEN, verified_only=False)
    assert outputs(every.records) == ["right", "other"]


def test_a_flat_trace_goes_only_where_it_was_found_wrong() -> None:
    rows = [
        {"question": "a", "cot": str(mark), "thought_correctness_verify": mark}
        for mark in (True, False, None)
    ]
    assert outputs(select_traces(rows, OPEN, OPEN).records) == ["True", "None"]


@pytest.mark.parametrize("empty", ["", None, " \n"])
def test_thought_and_solution_stand_in_for_an_empty_response(empty: str | None) -> None:
    assert outputs(select_traces([question(trace(empty))], OPEN, OPEN).records) == ["think\nsolve"]


def test_the_full_response_is_taken_as_it_is() -> None:
    text = " <think>\u200b رد </think>\n"
    assert select_traces([question(trace(text))], OPEN, OPEN).records == [
        {"instruction": "Why?", "input": "", "output": text}
    ]


def test_a_trace_without_any_text_is_counted() -> None:
    bare = trace("") | {"thought": None, "solution": ""}
    assert select_traces([question(bare)], OPEN, OPEN).dropped == {"no output": 1}


def test_the_shortest_traces_of_each_question_stay_in_dataset_order() -> None:
    rows = [
        question(trace("four"), trace("a"), trace("two 2"), trace("bb"), text="one"),
        question(trace("only, and long"), text="two"),
    ]
    selection = select_traces(rows, OPEN, OPEN, max_traces=3)
    assert outputs(selection.records) == ["four", "a", "bb", "only, and long"]
    assert selection.dropped == {"over max_traces": 1}
    assert outputs(select_traces(rows, OPEN, OPEN, max_traces=1).records) == ["a", "only, and long"]


def test_of_traces_of_one_length_the_earlier_stays() -> None:
    rows = [question(trace("aa"), trace("bb"), trace("cc"))]
    assert outputs(select_traces(rows, OPEN, OPEN, max_traces=2).records) == ["aa", "bb"]


def test_only_traces_that_pass_the_filters_count_as_shortest() -> None:
    rows = [question(trace("a", ok=False), trace("bb", rv=9), trace("long enough"))]
    selection = select_traces(rows, LevelBounds(None, 5), OPEN, max_traces=1)
    assert outputs(selection.records) == ["long enough"]


def test_the_traces_of_a_question_are_counted_together_over_rows() -> None:
    rows = [{"problem": name, "response": text} for name, text in ("ax", "by", "az", "ax")]
    selection = select_traces(rows, OPEN, OPEN, max_traces=2)
    assert [(item["instruction"], item["output"]) for item in selection.records] == [
        ("a", "x"),
        ("a", "z"),
        ("b", "y"),
    ]
    assert selection.dropped == {"duplicate": 1}


def test_max_traces_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_traces: found 0, expected 1 or more"):
        select_traces([], OPEN, OPEN, max_traces=0)


@pytest.mark.parametrize("asked", ["instruction", "question", "problem"])
@pytest.mark.parametrize("told", ["cot", "output", "response"])
def test_every_flat_column_pair_is_read(asked: str, told: str) -> None:
    rows = [{asked: "a", told: "b", "input": "c", "rv_score": 2, "cd_score": 2.0}]
    selection = select_traces(rows, LevelBounds(2, 2), LevelBounds(2, 2))
    assert selection.records == [{"instruction": "a", "input": "c", "output": "b"}]
    assert (selection.rows_in, selection.traces_in) == (1, 1)


def test_a_flat_row_gives_its_first_filled_columns() -> None:
    row = {"instruction": "", "question": "q", "cot": None, "output": " ", "response": "r"}
    assert select_traces([row], OPEN, OPEN).records == [{"instruction": "q", "input": "", "output": "r"}]


def test_hostile_rows_are_dropped_and_counted() -> None:
    rows = [
        question(trace("one"), trace("one"), trace("two")),
        question(trace("x"), trace("y"), text=None),
        question(trace("x"), text=7),
        question(trace("x"), text="lone \ud800"),
        question(trace("null \0"), trace(b"bytes"), text="fine"),
        question(text="no traces"),
        {"question": "null traces", "reasoning": None},
        question(trace("x") | {"Reasoning_Verbosity": None}, text="no annotation"),
    ]
    selection = select_traces(rows, LevelBounds(0), OPEN)
    assert outputs(selection.records) == ["one", "two"]
    assert selection.dropped == {
        "duplicate": 1,
        "no instruction": 2,
        "no level": 1,
        "no trace": 2,
        "not text": 2,
        "not writable text": 2,
    }
    assert (selection.rows_in, selection.traces_in) == (8, 10)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "a", "answer": "b"}, "prompt, answer"),
        ({"question": "a"}, "question"),
        ({"cot": "a", "rv_score": 3}, "cot, rv_score"),
        ({"question": "a", "reasoning": "text"}, "question, reasoning"),
        ({"question": "a", "reasoning": {"thought": ["x"]}}, "question, reasoning"),
        ({"question": "a", "reasoning": ["x"]}, "question, reasoning"),
        ({"question": "a", "reasoning": [{"steps": "x"}]}, "question, reasoning"),
        ({}, "none"),
    ],
)
def test_another_schema_asks_to_inspect_the_first_row(row: dict, columns: str) -> None:
    with pytest.raises(SchemaError, match=SCHEMA + columns + r"\): "):
        select_traces([row], OPEN, OPEN)


@pytest.mark.parametrize("verified_only", [True, False])
def test_where_nothing_says_what_was_checked_every_trace_stays(verified_only: bool) -> None:
    rows = [{"question": "a", "reasoning": [{"thought": "x", "solution": "y"}]}]
    assert outputs(select_traces(rows, OPEN, OPEN, verified_only).records) == ["x\ny"]


def test_the_sample_selection_equals_a_plain_reference() -> None:
    rows = pq.read_table(f"{SAMPLE}/data/train-00000-of-00001.parquet").to_pylist()[:100]
    expected = []
    for row in rows:
        fitting = [
            item["full_response"]
            for item in row["reasoning"]
            if item["thought_correctness_verify"]
            and 2 <= item["Reasoning_Verbosity"]["level"] <= 6
            and item["Cognitive_Difficulty"]["level"] <= 5
        ]
        shortest = sorted(fitting, key=len)[:2]
        expected += [(row["question"], text) for text in fitting if text in shortest]
    train, _, metrics = prepare(rv_min=2, rv_max=6, cd_max=5, max_traces=2, heldout_fraction=0.0)
    assert [(item["instruction"], item["output"]) for item in train] == expected
    assert metrics["rows_in"] == 100
    assert metrics["traces_in"] == sum(len(row["reasoning"]) for row in rows)


def test_preparing_the_sample_accounts_for_every_trace() -> None:
    train, heldout, metrics = prepare(rv_max=6, max_traces=2)
    assert metrics["train"] == len(train) and metrics["heldout"] == len(heldout) > 1
    assert len(train) + len(heldout) + sum(metrics["dropped"].values()) == metrics["traces_in"]
    assert metrics["train_questions"] == len({item["instruction"] for item in train})


def test_a_held_out_question_has_one_record_and_no_trace_in_train() -> None:
    train, heldout, metrics = prepare(heldout_fraction=0.3)
    assert len({item["instruction"] for item in heldout}) == len(heldout)
    assert overlap(train, heldout) == 0
    assert metrics["dropped"]["further trace of a held-out question"] > 0
    every = prepare(heldout_fraction=0.0)[0]
    firsts = {item["instruction"]: item for item in reversed(every)}
    assert all(firsts[item["instruction"]] == item for item in heldout)


def test_growing_the_slice_keeps_every_held_out_question_held_out() -> None:
    small = prepare(slice_str="train[:60]", heldout_fraction=0.2)[1]
    big = prepare(slice_str="train[:120]", heldout_fraction=0.2)[1]
    assert [item for item in big if item in small] == small and len(big) > len(small) > 1


def test_nothing_left_says_which_filter_took_how_many() -> None:
    with pytest.raises(EmptyDataError, match=r"none of 100 rows with \d+ traces .*RV out of bounds"):
        prepare(rv_min=0, rv_max=0)


def test_bounds_the_wrong_way_round_fail_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="minimum 7 is over maximum 2"):
        prepare("owner/never-asked-for", rv_min=7, rv_max=2)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rv_max", 10), ("cd_min", -1), ("max_traces", 0), ("heldout_fraction", 1.0), ("heldout_fraction", 0.0)],
)
def test_the_params_refuse_values_out_of_range(key: str, value: float) -> None:
    good = {
        "dataset": "a/b",
        "revision": None,
        "slice": "train",
        "rv_min": 0,
        "rv_max": 9,
        "cd_min": None,
        "cd_max": None,
        "verified_only": True,
        "max_traces": 1,
        "heldout_fraction": 0.1,
        "seed": 0,
    }
    assert PrepareS2Params(**good).rv_max == 9
    with pytest.raises(ValueError, match=key):
        PrepareS2Params(**{**good, key: value})
