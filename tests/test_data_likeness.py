"""Near duplicates and texts of benchmarks are found by their words."""

import json
import random
from pathlib import Path

import pytest
from selections import prepared, select_instructions, write_rows

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
