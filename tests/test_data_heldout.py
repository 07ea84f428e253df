"""The side of a text in the held-out split depends on the text and the seed alone.

Shown of the plain split, with which the selections are compared.
"""

import json
import random
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selections import split_heldout

from distill_app.core.files import Record, read_records
from distill_app.core.texts import normalise
from distill_app.data.frames import frame
from distill_app.data.heldout import normalise_all
from distill_app.data.overlap import overlap
from distill_app.data.reasoning import TraceRules, prepare_traces
from distill_app.data.selection import Outputs
from distill_app.data.sources import Dataset


def record(instruction: str, input_text: str = "", output: str = "") -> Record:
    return {"instruction": instruction, "input": input_text, "output": output}


RECORDS = [record(f"question {number}") for number in range(1000)]


def texts(records: list[Record]) -> set[str]:
    return {item["instruction"] for item in records}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello,  World!", "hello world"),
        ("ﬁve ＡＢＣ 𝐀", "five abc a"),
        ("Straße", "STRASSE"),
        ("zero\u200bwidth \u202bשלום\u202c", "zerowidth שלום"),
        ("a\u00a0b\u3000c\n", "a b c"),
        ("e\u0301", "é"),
        ("你好，世界。", "你好 世界"),
    ],
)
def test_texts_that_look_alike_are_normalised_to_the_same(one: str, other: str) -> None:
    assert normalise(one) == normalise(other) != ""


@pytest.mark.parametrize(("one", "other"), [("1 apple", "2 apples"), ("3 + 4", "3 = 4"), ("कि", "क")])
def test_digits_symbols_and_vowel_signs_are_kept(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


def test_normalising_twice_changes_nothing() -> None:
    for text in ("Hello, World!", "İstanbul ﬁ ͅ", "ǰ ᾳ ΰ", "..."):
        assert normalise(normalise(text)) == normalise(text)


def test_the_split_keeps_every_record_once_and_in_order() -> None:
    train, heldout = split_heldout(RECORDS, 0.1, 0)
    position = {item["instruction"]: number for number, item in enumerate(RECORDS)}
    for side in (train, heldout):
        assert [position[item["instruction"]] for item in side] == sorted(
            position[item["instruction"]] for item in side
        )
    assert texts(train) | texts(heldout) == texts(RECORDS)
    assert len(train) + len(heldout) == len(RECORDS)
    assert overlap(train, heldout).exact == 0


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_the_held_out_share_is_near_the_fraction(fraction: float) -> None:
    heldout = split_heldout(RECORDS, fraction, 0)[1]
    assert abs(len(heldout) - 1000 * fraction) < 60  # 4 standard deviations at most


def test_growing_a_slice_keeps_every_held_out_text_held_out() -> None:
    small_train, small_heldout = split_heldout(RECORDS[:300], 0.1, 5)
    train, heldout = split_heldout(RECORDS, 0.1, 5)
    assert texts(small_heldout) <= texts(heldout) and texts(small_train) <= texts(train)
    assert len(small_heldout) > 1


def test_the_order_of_the_records_does_not_matter() -> None:
    shuffled = random.Random(0).sample(RECORDS, len(RECORDS))
    assert texts(split_heldout(shuffled, 0.1, 5)[1]) == texts(split_heldout(RECORDS, 0.1, 5)[1])


def test_another_seed_holds_out_other_texts() -> None:
    one, other = (texts(split_heldout(RECORDS, 0.2, seed)[1]) for seed in (0, 1))
    assert one != other and one & other


def test_a_bigger_fraction_holds_out_the_same_texts_and_more() -> None:
    assert texts(split_heldout(RECORDS, 0.1, 0)[1]) < texts(split_heldout(RECORDS, 0.2, 0)[1])


def test_the_split_is_the_same_on_every_machine_and_python() -> None:
    heldout = split_heldout(RECORDS[:60], 0.1, 0)[1]
    assert [item["instruction"] for item in heldout] == ["question 4", "question 20", "question 33"]


def test_all_spellings_of_a_text_fall_on_one_side() -> None:
    records = [
        spelled
        for number in range(50)
        for spelled in (
            record(f"Question {number}?", "Why", "first"),
            record(f" question {number}", "why!", "second"),
        )
    ]
    train, heldout = split_heldout(records, 0.3, 0)
    assert overlap(train, heldout).exact == 0
    assert len(heldout) % 2 == 0 and heldout and train


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fraction", [1e-9, 0.999999999])
def test_two_texts_leave_no_side_empty(fraction: float, seed: int) -> None:
    records = [record("a"), record("b"), record("A!")]
    train, heldout = split_heldout(records, fraction, seed)
    assert train and heldout and overlap(train, heldout).exact == 0
    assert split_heldout(records, fraction, seed) == (train, heldout)
    assert split_heldout(records[::-1], fraction, seed)[1] == heldout[::-1]


def test_the_one_text_that_is_forced_out_is_the_first_that_a_bigger_fraction_takes() -> None:
    forced = texts(split_heldout(RECORDS[:20], 1e-9, 0)[1])
    assert len(forced) == 1
    assert forced <= texts(split_heldout(RECORDS[:20], 0.2, 0)[1])


def test_a_single_text_stays_whole_and_no_record_is_no_error() -> None:
    train, heldout = split_heldout([record("a"), record("A")], 0.5, 0)
    assert sorted([len(train), len(heldout)]) == [0, 2]
    assert split_heldout([], 0.5, 0) == ([], [])


def test_a_fraction_of_nothing_holds_out_nothing() -> None:
    assert split_heldout(RECORDS, 0, 0) == (RECORDS, [])


def test_overlap_counts_the_held_out_records_that_train_has_too() -> None:
    train = [record("Hello, world"), record("other")]
    heldout = [record("hello world!"), record("HELLO WORLD"), record("new")]
    assert overlap(train, heldout).exact == 2
    assert overlap([], heldout).exact == overlap(train, []).exact == 0


@settings(deadline=None)
@given(st.lists(st.text(st.characters(max_codepoint=127)) | st.text(st.characters(codec="utf-8"))))
def test_many_texts_are_normalised_as_each_alone(texts: list[str]) -> None:
    assert normalise_all(pa.array(texts, pa.string())).to_pylist() == [normalise(text) for text in texts]


@settings(deadline=None)
@given(st.lists(st.text(st.sampled_from("aB .,\t\n\x01$+"))))
def test_many_ascii_texts_are_normalised_as_each_alone(texts: list[str]) -> None:
    sliced = pa.array(["odd", *texts], pa.string())[1:]
    assert normalise_all(sliced).to_pylist() == [normalise(text) for text in texts]


def framed_side(tmp_path: Path, rows: list[dict], **rules: float) -> tuple[list[str], list[str], dict]:
    """Prepare flat traces; return the questions to train on, those held out, and the counts."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held_out = (str(tmp_path / name) for name in ("train.json", "heldout.json"))
    metrics = prepare_traces(
        Dataset(str(tmp_path / "rows.jsonl")), TraceRules(**rules), 0.1, 17, Outputs(train, held_out)
    )
    sides = [[record["instruction"] for record in read_records(path)] for path in (train, held_out)]
    return (*sides, metrics)


def framed_rows(frames: int, each: int) -> list[dict]:
    """Problems in so many frames, each told with other names, numbers and things."""
    names, things = ("Mia", "Tom", "Zoe", "Ben", "Ravi"), ("pens", "cups", "nuts", "hats", "eggs")
    words = ("the", "a", "of", "for", "with", "each", "how", "many", "when", "then", "and", "or")
    return [
        {
            "question": f"{names[n % 5]} has {n} {things[n % 5]} {' '.join(words[f // 12**k % 12] + ' item' for k in range(3))}?",
            "cot": f"So it is {n}.",
        }
        for n in range(each)
        for f in range(frames)
    ]


def test_frames_that_are_held_out_whole_are_in_no_training_problem(tmp_path):
    train, held_out, metrics = framed_side(tmp_path, framed_rows(100, 4), heldout_frames=0.3)
    known, asked = set(map(frame, train)), set(map(frame, held_out))
    assert len(asked - known) == metrics["heldout_frames"] and 15 < len(asked - known) < 45
    assert asked & known  # of the other frames single problems are held out, as always


def test_without_frames_to_hold_out_the_sides_are_those_of_the_texts(tmp_path):
    rows = framed_rows(100, 4)
    plain, none = framed_side(tmp_path, rows), framed_side(tmp_path, rows, heldout_frames=0.0)
    assert plain == none and "heldout_frames" not in plain[2]


def test_a_problem_keeps_its_side_when_frames_are_held_out_and_the_slice_grows(tmp_path):
    rows = framed_rows(100, 4)
    few, _, _ = framed_side(tmp_path, rows[:150], heldout_frames=0.3)
    many, held_out, _ = framed_side(tmp_path, rows, heldout_frames=0.3)
    assert set(few) <= set(many) and not set(few) & set(held_out)


def test_a_share_of_frames_out_of_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"heldout_frames: found 1\.0, expected 0 or more and less than 1"):
        framed_side(tmp_path, framed_rows(5, 2), heldout_frames=1.0)
