"""System 1 rows become records of text, and every row that does not is counted."""

import json
from pathlib import Path

import pytest

from distill_app.core.errors import EmptyDataError, SchemaError
from distill_app.core.files import read_records, save_json
from distill_app.data.instructions import prepare_instructions, read_instructions
from distill_app.data.params import PrepareS1Params

SAMPLE = str(Path(__file__).resolve().parents[1] / "data" / "sample" / "DistilQwen_100k")
HOSTILE = [
    {"instruction": "Add.", "input": "1 + 2", "output": "3"},
    {"instruction": "Hello?", "input": None, "output": None},
    {"instruction": None, "input": "The input asks.", "output": "yes"},
    {"instruction": " \n", "input": None, "output": "no question"},
    {"instruction": 7, "input": "", "output": "x"},
    {"instruction": "list", "input": ["x"], "output": "x"},
    {"instruction": "number", "input": "", "output": 0.5},
    {"instruction": "lone \ud800", "input": "", "output": "x"},
    {"instruction": "null \0", "input": "", "output": "x"},
    {"instruction": "שלום\u200f zero\u200bwidth", "input": "", "output": "\u202eرد"},
    {"instruction": " Hello?\n", "input": "", "output": "again"},
    {"instruction": "Add.", "input": "2 + 2", "output": "4"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_dir = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache_dir)


def row(instruction: object, **others: object) -> dict:
    return {"instruction": instruction, **others}


def test_hostile_rows_are_kept_as_text_or_dropped_and_counted() -> None:
    selection = read_instructions(HOSTILE)
    assert selection.records == [
        {"instruction": "Add.", "input": "1 + 2", "output": "3"},
        {"instruction": "Hello?", "input": "", "output": ""},
        {"instruction": "The input asks.", "input": "", "output": "yes"},
        {"instruction": "שלום\u200f zero\u200bwidth", "input": "", "output": "\u202eرد"},
        {"instruction": "Add.", "input": "2 + 2", "output": "4"},
    ]
    assert selection.dropped == {
        "duplicate": 1,
        "no instruction": 1,
        "not text": 3,
        "not writable text": 2,
    }
    assert selection.rows_in == len(HOSTILE) == len(selection.records) + 7


def test_what_is_kept_can_be_written_and_read_back(tmp_path: Path) -> None:
    records = read_instructions(HOSTILE).records
    save_json(tmp_path / "records.json", records)
    assert read_records(tmp_path / "records.json") == records


def test_a_missing_input_or_output_column_is_empty_text() -> None:
    assert read_instructions([row("a")]).records == [{"instruction": "a", "input": "", "output": ""}]


def test_the_first_of_a_duplicate_stays() -> None:
    selection = read_instructions([row("a  b", output="1"), row("a\nb", output="2")])
    assert [record["output"] for record in selection.records] == ["1"]
    assert selection.dropped == {"duplicate": 1}


@pytest.mark.parametrize(
    ("one", "other"),
    [("What is 3 * 4?", "What is 3 / 4?"), ("What is 5²?", "What is 52?"), ("polish", "Polish")],
)
def test_texts_that_differ_in_meaning_are_no_duplicates(one: str, other: str) -> None:
    assert len(read_instructions([row(one), row(other)]).records) == 2


def test_the_same_instruction_with_another_input_is_no_duplicate() -> None:
    assert len(read_instructions([row("a", input="b c"), row("a b", input="c")]).records) == 2


def test_rows_without_an_instruction_column_name_the_columns_found() -> None:
    with pytest.raises(SchemaError, match="found columns prompt, answer; expected instruction"):
        read_instructions([{"prompt": "a", "answer": "b"}])


def test_no_rows_give_an_empty_selection() -> None:
    selection = read_instructions([])
    assert (selection.records, selection.rows_in, selection.dropped) == ([], 0, {})


def test_rows_are_read_one_at_a_time() -> None:
    def rows():
        yield row("a")
        raise RuntimeError("the second row was asked for")

    with pytest.raises(RuntimeError, match="second row"):
        read_instructions(rows())


def test_preparing_the_sample_accounts_for_every_row() -> None:
    train, heldout, metrics = prepare_instructions(SAMPLE, "train[:200]", None, 0.1, 1)
    assert metrics["rows_in"] == 200
    assert metrics["train"] == len(train) and metrics["heldout"] == len(heldout)
    assert len(train) + len(heldout) + sum(metrics["dropped"].values()) == 200
    assert 5 <= len(heldout) <= 40
    assert {tuple(record) for record in train + heldout} == {("instruction", "input", "output")}


def test_preparing_twice_gives_the_same() -> None:
    arguments = (SAMPLE, "train[:50]", None, 0.2, 3)
    assert prepare_instructions(*arguments) == prepare_instructions(*arguments)


def test_nothing_left_says_which_filter_took_how_many(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": 1}, {"instruction": 2}]), encoding="utf-8")
    with pytest.raises(EmptyDataError, match=r"train: none of 2 rows is left \(dropped: 2 not text"):
        prepare_instructions(str(path), "train", None, 0.1, 0)


def test_mixed_types_in_a_json_column_are_counted_not_fatal(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": "a"}, {"instruction": 3}, {"instruction": ["b"]}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    train, _, metrics = prepare_instructions(str(path), "train", None, 0.0, 0)
    assert [record["instruction"] for record in train] == ["a"]
    assert metrics["dropped"] == {"not text": 2}


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_the_params_refuse_a_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match="heldout_fraction"):
        PrepareS1Params(dataset="a/b", revision=None, slice="train", heldout_fraction=fraction, seed=0)
