"""System 2 traces are chosen by level, verification and length, and every other one is counted."""

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from selections import Selected, prepared, select_traces, write_rows

from distill_app.core.errors import EmptyDataError, SchemaError
from distill_app.core.files import Record
from distill_app.data.overlap import overlap
from distill_app.data.params import PrepareS2Params
from distill_app.data.reasoning import TraceRules, explain_traces, prepare_traces
from distill_app.data.sources import Dataset

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = str(ROOT / "data" / "sample" / "OmniThought")
SCHEMA = r"^Unexpected OmniThought schema, please inspect omni\[0\] \(columns: "
KINDS = pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])


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


def question(*traces: object, text: object = "Why?") -> dict:
    return {"question": text, "reasoning": list(traces)}


def prepare(folder: Path, slice_str: str = "train[:100]", fraction: float = 0.1, **rules: object) -> Selected:
    return prepared(
        prepare_traces, SAMPLE, slice_str, TraceRules(**rules), heldout_fraction=fraction, folder=folder
    )


@KINDS
@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(None, None, "0123456789"), (4, None, "456789"), (None, 4, "01234"), (3, 5, "345"), (0, 0, "0")],
)
@pytest.mark.parametrize("name", ["rv", "cd"])
def test_the_bounds_of_both_levels_are_inclusive(
    tmp_path: Path, kind: str, name: str, low: int | None, high: int | None, expected: str
) -> None:
    rows = [question(*(trace(str(level), **{name: level}) for level in range(10)))]
    selected = select_traces(tmp_path, rows, kind, **{f"{name}_min": low, f"{name}_max": high})
    assert selected.outputs == list(expected)
    out = 10 - len(expected)
    assert selected.dropped == ({f"{name.upper()} out of bounds": out} if out else {})


def test_bounds_that_hold_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="rv_min 5 is over rv_max 4"):
        TraceRules(rv_min=5, rv_max=4)


@pytest.mark.parametrize("level", [None, "3", True, math.nan, [3]])
def test_a_trace_without_a_level_is_dropped_where_a_bound_needs_it(tmp_path: Path, level: object) -> None:
    rows = [question(trace("has"), trace("has not", rv=level))]
    selected = select_traces(tmp_path, rows, rv_max=9)
    assert selected.outputs == ["has"]
    assert selected.dropped == {"no level": 1}
    assert len(select_traces(tmp_path, rows, cd_min=0).train) == 2


@KINDS
@pytest.mark.parametrize(("name", "rule"), [("RV", "rv_min"), ("CD", "cd_max"), ("RV", "rv_target")])
def test_a_rule_on_a_level_that_no_trace_has_is_a_schema_error(
    tmp_path: Path, kind: str, name: str, rule: str
) -> None:
    bare = trace() | {"Reasoning_Verbosity": None, "Cognitive_Difficulty": None}
    for rows in ([question(bare)], [{"question": "a", "cot": "b"}]):
        with pytest.raises(SchemaError, match=SCHEMA + f".*no trace has a {name} level"):
            select_traces(tmp_path, rows, kind, **{rule: 5})


@KINDS
@pytest.mark.parametrize("mark", [False, None])
def test_a_nested_trace_that_is_wrong_or_unchecked_goes_unless_all_are_wanted(
    tmp_path: Path, kind: str, mark: object
) -> None:
    rows = [question(trace("right"), trace("other", ok=mark))]
    selected = select_traces(tmp_path, rows, kind)
    assert selected.outputs == ["right"] and selected.dropped == {"not verified": 1}
    assert select_traces(tmp_path, rows, kind, verified_only=False).outputs == ["right", "other"]


@KINDS
def test_a_flat_trace_goes_only_where_it_was_found_wrong(tmp_path: Path, kind: str) -> None:
    rows = [
        {"question": "a", "cot": str(mark), "thought_correctness_verify": mark}
        for mark in (True, False, None)
    ]
    assert select_traces(tmp_path, rows, kind).outputs == ["True", "None"]


@pytest.mark.parametrize("one", [1, 1.0])
@KINDS
def test_marks_of_one_and_zero_are_true_and_false(tmp_path: Path, kind: str, one: float) -> None:
    marks = {"right": one, "wrong": 0 * one, "neither": 2 * one, "none": None}
    flat = [
        {"question": "a", "cot": text, "thought_correctness_verify": mark} for text, mark in marks.items()
    ]
    selected = select_traces(tmp_path, flat, kind)
    assert selected.outputs == ["right", "none"] and selected.dropped == {"not verified": 2}
    nested = [question(*(trace(text, ok=mark) for text, mark in marks.items()))]
    selected = select_traces(tmp_path, nested, kind)
    assert selected.outputs == ["right"] and selected.dropped == {"not verified": 3}
    assert len(select_traces(tmp_path, nested, kind, verified_only=False).train) == 4


def test_marks_of_one_and_zero_in_csv_are_true_and_false(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    marks = ("1", "0", "1.0", "0.0", "true", "FALSE", "", "perhaps")
    lines = "".join(f"a,is {mark},{mark}\n" for mark in marks)
    path.write_text(f"question,cot,thought_correctness_verify\n{lines}")
    selected = prepared(prepare_traces, path, "train", TraceRules(), folder=tmp_path / "out")
    assert selected.outputs == ["is 1", "is 1.0", "is true", "is "]
    assert selected.dropped == {"not verified": 4}


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_a_field_that_the_first_rows_lack_is_read(tmp_path: Path, kind: str) -> None:
    flat = [{"question": str(n), "cot": "x"} for n in range(1000)]
    late = {"question": "late", "cot": "y", "thought_correctness_verify": False, "rv_score": 9}
    assert select_traces(tmp_path, [*flat, late], kind).dropped == {"not verified": 1}
    assert select_traces(tmp_path, [*flat, late], kind, rv_min=9, verified_only=False).outputs == ["y"]


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_a_field_that_the_first_traces_lack_is_read(tmp_path: Path, kind: str) -> None:
    bare = [question({"thought": "x", "solution": "y"}, text=str(n)) for n in range(1000)]
    late = question({"full_response": "right", "thought_correctness_verify": True}, trace("wrong", ok=False))
    selected = select_traces(tmp_path, [*bare, late], kind)
    assert selected.outputs == ["right"] and selected.dropped == {"not verified": 1001}
    selected = select_traces(tmp_path, [*bare, late], kind, verified_only=False)
    assert len(selected.train) == 1002 and selected.outputs[-2:] == ["right", "wrong"]


def test_a_csv_file_has_levels_and_marks_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        "question,cot,rv_score,cd_score,thought_correctness_verify\n"
        'a,"b, c",3,2.0,true\na,d,x,2,True\na,e,3,2,False\na,f,4,2,\n'
    )
    selected = prepared(prepare_traces, path, "train", TraceRules(rv_max=3), folder=tmp_path / "out")
    assert selected.outputs == ["b, c"]
    assert selected.dropped == {"RV out of bounds": 1, "no level": 1, "not verified": 1}


@KINDS
def test_only_the_teachers_asked_for_stay(tmp_path: Path, kind: str) -> None:
    rows = [question(trace("a"), trace("b") | {"teacher": "DeepSeek-R1"}, trace("c") | {"teacher": None})]
    selected = select_traces(tmp_path, rows, kind, teachers=("DeepSeek-R1", "o'one"))
    assert selected.outputs == ["b"] and selected.dropped == {"other teacher": 2}
    with pytest.raises(SchemaError, match="no trace has a teacher, but teachers is set"):
        select_traces(tmp_path, [{"question": "a", "cot": "b"}], kind, teachers=("QwQ-32B",))


@KINDS
@pytest.mark.parametrize("empty", ["", None, " \n\u3000"])
def test_thought_and_solution_stand_in_for_an_empty_response(
    tmp_path: Path, kind: str, empty: str | None
) -> None:
    rows = [question(trace(empty), trace("whole"))]
    assert select_traces(tmp_path, rows, kind).outputs == ["think\nsolve", "whole"]


def test_the_full_response_is_taken_as_it_is(tmp_path: Path) -> None:
    text = " <think>\u200b رد </think>\n"
    assert select_traces(tmp_path, [question(trace(text))]).train == [
        {"instruction": "Why?", "input": "", "output": text}
    ]


def test_a_trace_without_any_text_is_counted(tmp_path: Path) -> None:
    bare = trace("") | {"thought": None, "solution": ""}
    assert select_traces(tmp_path, [question(bare, trace())]).dropped == {"no output": 1}


@KINDS
def test_the_shortest_traces_of_each_question_stay_in_dataset_order(tmp_path: Path, kind: str) -> None:
    rows = [
        question(trace("four"), trace("a"), trace("two 2"), trace("bb"), text="one"),
        question(trace("only, and long"), text="two"),
    ]
    selected = select_traces(tmp_path, rows, kind, max_traces=3)
    assert selected.outputs == ["four", "a", "bb", "only, and long"]
    assert selected.dropped == {"over max_traces": 1}
    assert select_traces(tmp_path, rows, kind, max_traces=1).outputs == ["a", "only, and long"]


def test_of_traces_of_one_length_the_earlier_stays(tmp_path: Path) -> None:
    rows = [question(trace("aa"), trace("éé"), trace("cc"))]
    assert select_traces(tmp_path, rows, max_traces=2).outputs == ["aa", "éé"]


def test_the_traces_nearest_to_the_target_levels_stay_and_of_equals_the_shortest(tmp_path: Path) -> None:
    rows = [question(trace("far", 9, 9), trace("near", 4, 5), trace("also", 5, 4), trace("nea", 5, 6))]
    rows[0]["reasoning"].append(trace("?", rv=None))
    assert select_traces(tmp_path, rows, max_traces=1, rv_target=5, cd_target=5).outputs == ["nea"]
    assert select_traces(tmp_path, rows, max_traces=2, rv_target=9).outputs == ["far", "nea"]
    assert select_traces(tmp_path, rows, max_traces=4, rv_target=9).outputs == ["far", "near", "also", "nea"]


def test_only_traces_that_pass_the_filters_count_as_shortest(tmp_path: Path) -> None:
    rows = [question(trace("a", ok=False), trace("bb", rv=9), trace("long enough"))]
    assert select_traces(tmp_path, rows, rv_max=5, max_traces=1).outputs == ["long enough"]


def test_a_limit_in_tokens_is_the_limit_of_training(tmp_path: Path, tiny_model_dir: Path) -> None:
    from distill_app.core.models import load_tokenizer
    from distill_app.core.prompts import chat_template
    from distill_app.training.examples import Template, build_examples

    rows = [question(*(trace("step " * n) for n in range(1, 6)))]
    every = select_traces(tmp_path, rows).train
    template = Template(chat_template("system2"), None)
    examples = build_examples(every, load_tokenizer(str(tiny_model_dir)), template).train
    lengths = [len(example.input_ids) for example in examples]
    assert lengths == sorted(set(lengths))
    for kept in (2, 4):
        rules = {"tokenizer": str(tiny_model_dir), "max_tokens": lengths[kept - 1]}
        selected = select_traces(tmp_path, rows, **rules)
        assert selected.train == every[:kept] and selected.dropped == {"over max_tokens": 5 - kept}
    with pytest.raises(ValueError, match="max_tokens: no tokenizer"):
        TraceRules(max_tokens=5)


@KINDS
def test_the_traces_of_a_question_are_counted_together_over_rows(tmp_path: Path, kind: str) -> None:
    rows = [{"problem": name, "response": text} for name, text in ("ax", "by", "az", "ax")]
    selected = select_traces(tmp_path, rows, kind, max_traces=2)
    assert [(item["instruction"], item["output"]) for item in selected.train] == [
        ("a", "x"),
        ("a", "z"),
        ("b", "y"),
    ]
    assert selected.dropped == {"duplicate": 1}


@KINDS
def test_a_question_with_other_white_space_is_the_same_question(tmp_path: Path, kind: str) -> None:
    asked = ("What is 2+2?", "What  is 2+2?", " What is\n2+2?", "What is 2 + 2?")
    rows = [question(trace("four four"), trace(f"4{n}"), text=text) for n, text in enumerate(asked)]
    assert select_traces(tmp_path, rows, kind).dropped == {"duplicate": 2}
    selected = select_traces(tmp_path, rows, kind, max_traces=1)
    assert [(record["instruction"], record["output"]) for record in selected.train] == [
        ("What is 2+2?", "40"),
        ("What is 2 + 2?", "43"),
    ]
    assert selected.dropped == {"duplicate": 2, "over max_traces": 4}


def test_max_traces_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_traces: found 0, expected 1 or more"):
        TraceRules(max_traces=0)


@KINDS
@pytest.mark.parametrize("asked", ["instruction", "question", "problem"])
@pytest.mark.parametrize("told", ["cot", "output", "response"])
def test_every_flat_column_pair_is_read(tmp_path: Path, kind: str, asked: str, told: str) -> None:
    rows = [{asked: "a", told: "b", "input": "c", "rv_score": 2, "cd_score": 2.0}]
    selected = select_traces(tmp_path, rows, kind, rv_min=2, rv_max=2, cd_min=2, cd_max=2)
    assert selected.train == [{"instruction": "a", "input": "c", "output": "b"}]
    assert (selected.metrics["rows_in"], selected.metrics["traces_in"]) == (1, 1)


@KINDS
def test_a_flat_row_gives_its_first_filled_columns(tmp_path: Path, kind: str) -> None:
    row = {"instruction": "", "question": "q", "cot": None, "output": " ", "response": "r"}
    assert select_traces(tmp_path, [row], kind).train == [{"instruction": "q", "input": "", "output": "r"}]


def test_hostile_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [
        question(trace("one"), trace("one"), trace("two")),
        question(trace("x"), trace("y"), text=None),
        question(trace("x"), text=7),
        question(trace("x"), text="nul \0"),
        question(trace("null \0"), trace({"a": 1}), text="fine"),
        question(text="no traces"),
        {"question": "null traces", "reasoning": None},
        question(trace("x") | {"Reasoning_Verbosity": None}, text="no annotation"),
        "no object",
    ]
    selected = select_traces(tmp_path, rows, rv_min=0)
    assert selected.outputs == ["one", "two"]
    assert selected.dropped == {
        "duplicate": 1,
        "no instruction": 2,
        "no level": 1,
        "no trace": 2,
        "not an object": 1,
        "not text": 2,
        "not writable text": 2,
    }
    assert (selected.metrics["rows_in"], selected.metrics["traces_in"]) == (9, 10)


def test_a_trace_that_says_a_thing_twice_is_a_counted_reject(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"question": "a", "reasoning": [{"full_response": "b", "full_response": "c"}, {"full_response": "d"}]}\n'
        '{"question": "a", "question": "b", "reasoning": [{"full_response": "e"}]}\n'
    )
    selected = prepared(prepare_traces, path, "train", TraceRules(), folder=tmp_path / "out")
    assert selected.outputs == ["d"] and selected.dropped == {"duplicated key": 2}


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"answer": "a", "prompt": "b"}, "answer, prompt"),
        ({"question": "a"}, "question"),
        ({"cot": "a", "rv_score": 3}, "cot, rv_score"),
        ({"question": "a", "reasoning": "text"}, "question, reasoning"),
        ({"question": "a", "reasoning": {"thought": ["x"]}}, "question, reasoning"),
        ({"question": "a", "reasoning": ["x"]}, "question, reasoning"),
        ({"question": "a", "reasoning": [{"steps": "x"}]}, "question, reasoning"),
    ],
)
@KINDS
def test_another_schema_asks_to_inspect_the_first_row(
    tmp_path: Path, kind: str, row: dict, columns: str
) -> None:
    with pytest.raises(SchemaError, match=SCHEMA + columns + r"\): "):
        select_traces(tmp_path, [row], kind)


@KINDS
@pytest.mark.parametrize("verified_only", [True, False])
def test_where_nothing_says_what_was_checked_every_trace_stays(
    tmp_path: Path, kind: str, verified_only: bool
) -> None:
    rows = [{"question": "a", "reasoning": [{"thought": "x", "solution": "y"}]}]
    assert select_traces(tmp_path, rows, kind, verified_only=verified_only).outputs == ["x\ny"]


def test_the_sample_selection_equals_a_plain_reference(tmp_path: Path) -> None:
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
    selected = prepare(tmp_path, rv_min=2, rv_max=6, cd_max=5, max_traces=2, fraction=0.0)
    assert [(item["instruction"], item["output"]) for item in selected.train] == expected
    assert selected.metrics["rows_in"] == 100
    assert selected.metrics["traces_in"] == sum(len(row["reasoning"]) for row in rows)


def test_preparing_the_sample_accounts_for_every_trace(tmp_path: Path) -> None:
    selected = prepare(tmp_path, rv_max=6, max_traces=2)
    train, heldout, metrics = selected.train, selected.heldout, selected.metrics
    assert metrics["train"] == len(train) and metrics["heldout"] == len(heldout) > 1
    assert len(train) + len(heldout) + sum(metrics["dropped"].values()) == metrics["traces_in"]
    assert metrics["train_questions"] == len({item["instruction"] for item in train})


def test_a_held_out_question_has_one_record_and_no_trace_in_train(tmp_path: Path) -> None:
    selected = prepare(tmp_path, fraction=0.3)
    heldout = selected.heldout
    assert len({item["instruction"] for item in heldout}) == len(heldout)
    assert overlap(selected.train, heldout).exact == 0
    assert selected.dropped["further trace of a held-out question"] > 0
    every: list[Record] = prepare(tmp_path, fraction=0.0).train
    firsts = {item["instruction"]: item for item in reversed(every)}
    assert all(firsts[item["instruction"]] == item for item in heldout)


def test_growing_the_slice_keeps_every_held_out_question_held_out(tmp_path: Path) -> None:
    small = prepare(tmp_path, "train[:60]", fraction=0.2).heldout
    big = prepare(tmp_path, "train[:120]", fraction=0.2).heldout
    assert [item for item in big if item in small] == small and len(big) > len(small) > 1


def test_nothing_left_says_which_filter_took_how_many(tmp_path: Path) -> None:
    with pytest.raises(EmptyDataError, match=r"none of 100 rows with \d+ traces .*RV out of bounds"):
        prepare(tmp_path, rv_min=0, rv_max=0)


def test_each_trace_of_a_row_is_explained(tmp_path: Path) -> None:
    rows = [
        question(trace("a"), text="Other?"),
        question(trace("a", rv=9), trace("b", ok=False), trace("longer"), trace("c")),
        question(text="None?"),
    ]
    path = write_rows(tmp_path / "rows.parquet", rows)
    rules = TraceRules(rv_max=5, max_traces=1)
    lines = explain_traces(Dataset(str(path)), rules, 0.0, 0, 1)
    assert [line.split(" (")[0] for line in lines] == [
        "row 1, trace 0: dropped: RV out of bounds",
        "row 1, trace 1: dropped: not verified",
        "row 1, trace 2: dropped: over max_traces",
        "row 1, trace 3: kept for training",
    ]
    assert "rv 9.0, cd 3.0, teacher 'QwQ-32B'" in lines[0] and "instruction 'Why?'" in lines[0]
    (line,) = explain_traces(Dataset(str(path), "train[1:]"), rules, 0.0, 0, 1)
    assert line.startswith("row 1: dropped: no trace (") and "'None?'" in line


@pytest.mark.parametrize(
    ("key", "value"),
    [("rv_max", 10), ("cd_min", -1), ("max_traces", 0), ("heldout_fraction", 1.0), ("heldout_fraction", 0.0)],
)
def test_the_params_refuse_values_out_of_range(key: str, value: float) -> None:
    good = yaml.safe_load((ROOT / "params.yaml").read_text())["prepare_s2"]
    assert PrepareS2Params(**good).rules() == TraceRules(
        rv_max=3, cd_max=5, max_traces=1, heldout_frames=0.04
    )
    with pytest.raises(ValueError, match=key):
        PrepareS2Params(**{**good, key: value})


def test_a_row_of_two_thousand_traces_and_traces_of_a_megabyte_are_taken_whole(tmp_path) -> None:
    many = [{"full_response": f"answer {number}"} for number in range(2000)]
    long = [{"full_response": letter * 1_000_000} for letter in "abc"]
    rows = [{"question": "many", "reasoning": many}, {"question": "long", "reasoning": long}]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = prepared(prepare_traces, path, "train", TraceRules(), folder=tmp_path / "out")
    outputs = [record["output"] for record in found.train]
    assert outputs == [trace["full_response"] for trace in many + long] and not found.dropped
