"""Near duplicates and texts of benchmarks are found by their words."""

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from selections import prepared, select_instructions, write_rows

from distill_app.core.errors import EmptyDataError
from distill_app.data.decontamination import has_any
from distill_app.data.instructions import InstructionRules, prepare_instructions
from distill_app.data.likeness import grams, words

WORDS = [f"word{number}" for number in range(500)]


def row(instruction: str) -> dict:
    return {"instruction": instruction, "output": "x"}


def sentence(seed: int, length: int = 40) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def test_words_are_letters_where_a_script_writes_no_blanks() -> None:
    assert words("Hello, World! x=1") == ["hello", "world", "x", "=", "1"]
    assert words("你好,abc世界") == ["你", "好", "abc", "世", "界"]


def test_runs_of_words_overlap_and_a_short_text_is_one_run() -> None:
    assert grams(["a", "b", "c"], 2) == ["a b", "b c"]
    assert grams(["a"], 2) == ["a"] and grams([], 2) == []


def test_near_duplicates_go_and_the_first_stays(tmp_path: Path) -> None:
    texts = [sentence(number) for number in range(50)]
    near = [[*text[:-1], "changed"] for text in texts[:20]]
    rows = [row(" ".join(text)) for text in texts + near]
    selected = select_instructions(tmp_path, rows, near_duplicates=0.8)
    assert [record["instruction"] for record in selected.train] == [row["instruction"] for row in rows[:50]]
    assert selected.dropped == {"near duplicate": 20}
    assert len(select_instructions(tmp_path, rows).train) == 70


def test_near_duplicates_in_chinese_are_found(tmp_path: Path) -> None:
    text = "请写一个关于一只学会游泳的狗的短篇故事,要求语言生动,情节完整,结尾出人意料。"
    selected = select_instructions(
        tmp_path, [row(text), row(text + "谢谢"), row("今天天气怎么样?")], near_duplicates=0.7
    )
    assert len(selected.train) == 2


def test_what_shares_words_in_a_row_with_a_benchmark_is_not_trained_on(tmp_path: Path) -> None:
    secret = sentence(1000)
    rows = [row(" ".join([*sentence(n), *secret[n : n + 12 + n % 3], *sentence(n + 99)])) for n in range(12)]
    benchmark = tmp_path / "test set.json"
    benchmark.write_text(json.dumps([{"id": 3, "q": {"text": [" ".join(secret).upper()]}}]))
    rules = {"overlap_words": 13, "benchmarks": (str(benchmark),)}
    selected = select_instructions(tmp_path, rows, **rules)
    assert [r["instruction"] for r in selected.train] == [r["instruction"] for r in rows[0::3]]
    assert selected.dropped == {"overlap with test set.json": 8}
    with pytest.raises(FileNotFoundError, match="none.json: no such file"):
        select_instructions(tmp_path, rows, overlap_words=13, benchmarks=("./none.json",))


@given(st.lists(st.integers(0, 2**64 - 1)), st.lists(st.integers(0, 2**64 - 1)), st.lists(st.integers(0, 9)))
def test_a_number_is_found_among_sorted_ones_wherever_it_stands(one: list, other: list, both: list) -> None:
    ordered = np.unique(np.array([*one, *both], np.uint64))
    for wanted in (other, [*other, *both], [*other, *one[:1]], []):
        assert has_any(ordered, np.array(wanted, np.uint64)) == bool({*one, *both} & set(wanted))


def test_a_text_is_looked_up_without_touching_all_that_is_guarded() -> None:
    ordered, wanted = np.arange(0, 2_000_000, 2, dtype=np.uint64), np.arange(1, 1001, 2, dtype=np.uint64)
    tracemalloc.start()
    try:
        assert not has_any(ordered, wanted)
        assert tracemalloc.get_traced_memory()[1] < ordered.nbytes / 100
    finally:
        tracemalloc.stop()


def test_what_shares_words_in_a_row_with_a_held_out_text_is_not_trained_on(tmp_path: Path) -> None:
    common = sentence(7, 8)
    rows = [row(" ".join([f"start{n}", *common, f"end{n}"])) for n in range(20)]
    rows += [row(" ".join(sentence(n))) for n in range(20)]
    path = write_rows(tmp_path / "rows.parquet", rows)
    options = {"heldout_fraction": 0.3, "seed": 1, "folder": tmp_path / "out"}
    plain = prepared(prepare_instructions, path, "train", InstructionRules(), **options)
    strict = prepared(prepare_instructions, path, "train", InstructionRules(overlap_words=8), **options)
    assert strict.heldout == plain.heldout
    assert any(common[0] in record["instruction"] for record in strict.heldout)
    alike = [record for record in plain.train if record["instruction"].startswith("start")]
    assert alike and strict.train == [record for record in plain.train if record not in alike]
    assert strict.dropped == {"overlap with held-out": len(alike)}


def test_an_overlap_rule_that_leaves_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    common = " ".join(sentence(7, 8))
    path = write_rows(tmp_path / "rows.parquet", [row(f"start{n} {common} end{n}") for n in range(20)])
    with pytest.raises(EmptyDataError, match=r"\(held out: \d+; dropped: \d+ overlap with held-out\)"):
        prepared(
            prepare_instructions,
            path,
            "train",
            InstructionRules(overlap_words=8),
            heldout_fraction=0.3,
            folder=tmp_path / "out",
        )
    assert list((tmp_path / "out").iterdir()) == []
