"""System 1 rows become records of text, and every row that does not is counted."""

import json
from pathlib import Path

import pytest
from selections import Selected, prepared, select_instructions, write_rows

from distill_app.core.errors import EmptyDataError, SchemaError
from distill_app.core.files import read_json
from distill_app.data.instructions import InstructionRules, explain_instructions, prepare_instructions
from distill_app.data.params import PrepareS1Params
from distill_app.data.sources import Dataset

SAMPLE = str(Path(__file__).resolve().parents[1] / "data" / "sample" / "DistilQwen_100k")
HOSTILE = [
    {"instruction": "Add.", "input": "1 + 2", "output": "3"},
    {"instruction": "Hello?", "input": None, "output": None},
    {"instruction": None, "input": "The input asks.", "output": "yes"},
    {"instruction": " \n\u00a0\u3000", "input": None, "output": "no question"},
    {"instruction": 7, "input": "", "output": "x"},
    {"instruction": "list", "input": ["x"], "output": "x"},
    {"instruction": "number", "input": "", "output": 0.5},
    {"instruction": "null \0", "input": "", "output": "x"},
    {"instruction": "control \x01\x1f\x7f", "input": "", "output": "x"},
    {"instruction": "שלום\u200f zero\u200bwidth", "input": "", "output": "\u202eرد"},
    {"instruction": " Hello?\n", "input": "", "output": "again"},
    {"instruction": "Add.", "input": "2 + 2", "output": "4"},
    ["no object"],
]


def row(instruction: object, **others: object) -> dict:
    return {"instruction": instruction, **others}


def prepare(folder: Path, slice_str: str = "train[:200]", fraction: float = 0.1, **rules: object) -> Selected:
    rules = InstructionRules(**rules)
    return prepared(
        prepare_instructions, SAMPLE, slice_str, rules, heldout_fraction=fraction, seed=1, folder=folder
    )


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_hostile_rows_are_kept_as_text_or_dropped_and_counted(tmp_path: Path, kind: str) -> None:
    selected = select_instructions(tmp_path, HOSTILE, kind)
    assert selected.train == [
        {"instruction": "Add.", "input": "1 + 2", "output": "3"},
        {"instruction": "Hello?", "input": "", "output": ""},
        {"instruction": "The input asks.", "input": "", "output": "yes"},
        {"instruction": "control \x01\x1f\x7f", "input": "", "output": "x"},
        {"instruction": "שלום\u200f zero\u200bwidth", "input": "", "output": "\u202eرد"},
        {"instruction": "Add.", "input": "2 + 2", "output": "4"},
    ]
    assert selected.dropped == {
        "duplicate": 1,
        "no instruction": 1,
        "not an object": 1,
        "not text": 3,
        "not writable text": 1,
    }
    assert selected.metrics["rows_in"] == len(HOSTILE) == selected.metrics["kept"] + 7


def test_a_key_that_is_said_twice_is_a_counted_reject(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "instruction": "b"}\n{"instruction": "c"}\n')
    selected = prepared(prepare_instructions, path, "train", InstructionRules(), folder=tmp_path / "out")
    assert [record["instruction"] for record in selected.train] == ["c"]
    assert selected.dropped == {"duplicated key": 1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])
def test_a_text_of_ten_megabytes_is_kept_whole_or_dropped_by_its_length(tmp_path: Path, kind: str) -> None:
    rows = [row("short", output="é" * 5_000_000), row("x" * 10_000_000, output="y")]
    assert [len(r["instruction"]) for r in select_instructions(tmp_path, rows, kind).train] == [5, 10_000_000]
    selected = select_instructions(tmp_path, rows, kind, max_chars=100, max_output_chars=5_000_000)
    assert selected.outputs == ["é" * 5_000_000] and selected.dropped == {"over max_chars": 1}
    assert (tmp_path / "out" / "rejects.json").stat().st_size < 1000


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_a_missing_input_or_output_column_is_empty_text(tmp_path: Path, kind: str) -> None:
    selected = select_instructions(tmp_path, [row("a")], kind)
    assert selected.train == [{"instruction": "a", "input": "", "output": ""}]


def test_a_parquet_column_of_another_type_is_not_text(tmp_path: Path) -> None:
    rows = [row("a", input=None, output=3), row("b", input=None, output=None)]
    selected = select_instructions(tmp_path, rows, ".parquet")
    assert [r["instruction"] for r in selected.train] == ["b"] and selected.dropped == {"not text": 1}


def test_the_first_of_a_duplicate_stays(tmp_path: Path) -> None:
    texts = ["a  b", "a\nb", " a\u3000b\x1f", "a\u2028b ", "a\u200bb"]
    selected = select_instructions(tmp_path, [row(text, output=str(n)) for n, text in enumerate(texts)])
    assert selected.outputs == ["0", "4"]
    assert selected.dropped == {"duplicate": 3}


@pytest.mark.parametrize(
    ("one", "other"),
    [("What is 3 * 4?", "What is 3 / 4?"), ("What is 5²?", "What is 52?"), ("polish", "Polish")],
)
def test_texts_that_differ_in_meaning_are_no_duplicates(tmp_path: Path, one: str, other: str) -> None:
    assert len(select_instructions(tmp_path, [row(one), row(other)]).train) == 2


def test_the_same_instruction_with_another_input_is_no_duplicate(tmp_path: Path) -> None:
    rows = [row("a", input="b c"), row("a b", input="c")]
    assert len(select_instructions(tmp_path, rows).train) == 2


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_a_field_that_the_first_rows_lack_is_read(tmp_path: Path, kind: str) -> None:
    rows = [row(f"Say {n}.") for n in range(1000)]
    rows += [row("Translate into French.", input=f"word {n}", output=str(n)) for n in range(500)]
    selected = select_instructions(tmp_path, rows, kind)
    assert selected.dropped == {}
    assert [record["input"] for record in selected.train[1000:]] == [f"word {n}" for n in range(500)]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_rows_without_an_instruction_column_name_the_columns_found(tmp_path: Path, kind: str) -> None:
    with pytest.raises(SchemaError, match="found columns answer, prompt; expected instruction"):
        select_instructions(tmp_path, [{"answer": "b", "prompt": "a"}], kind)


def test_lengths_are_limited_in_characters_and_counted(tmp_path: Path) -> None:
    rows = [
        row("ab"),
        row("é漢c", input="👩"),
        row("abcd", output="long"),
        row("abcde"),
        row("abc", output="x"),
    ]
    selected = select_instructions(tmp_path, rows, min_chars=3, max_chars=4, max_output_chars=3)
    assert [r["instruction"] for r in selected.train] == ["é漢c", "abc"]
    assert selected.dropped == {"over max_chars": 1, "over max_output_chars": 1, "under min_chars": 1}


def test_tokens_are_limited_as_training_counts_them(tmp_path: Path, tiny_model_dir: Path) -> None:
    from distill_app.core.models import load_tokenizer
    from distill_app.training.examples import build_examples, read_template

    rows = [row(f"Say {'word ' * n}", input="", output="yes " * n) for n in range(1, 6)]
    everything = select_instructions(tmp_path, rows).train
    examples = build_examples(everything, load_tokenizer(str(tiny_model_dir)), read_template(None)).train
    lengths = [len(example.input_ids) for example in examples]
    rules = {"tokenizer": str(tiny_model_dir), "max_tokens": lengths[2]}
    selected = select_instructions(tmp_path, rows, **rules)
    assert selected.train == everything[:3] and selected.dropped == {"over max_tokens": 2}
    assert selected.metrics["tokens"] == {
        "counted_by": str(tiny_model_dir),
        "median": lengths[1],
        "p95": lengths[2],
        "max": lengths[2],
    }


def test_languages_are_told_apart(tmp_path: Path) -> None:
    rows = [
        row("Write a short story about a dog that learns to swim."),
        row("请写一个关于学会游泳的狗的短篇故事。"),
    ]
    selected = select_instructions(tmp_path, rows, languages=("zh",))
    assert [r["instruction"] for r in selected.train] == [rows[1]["instruction"]]
    assert selected.dropped == {"other language": 1}
    with pytest.raises(ValueError, match="languages: found klingon, expected some of ace, af, "):
        select_instructions(tmp_path, rows, languages=("klingon",))


def test_preparing_the_sample_accounts_for_every_row(tmp_path: Path) -> None:
    selected = prepare(tmp_path)
    metrics = selected.metrics
    assert metrics["rows_in"] == 200
    assert metrics["train"] == len(selected.train) and metrics["heldout"] == len(selected.heldout)
    assert len(selected.train) + len(selected.heldout) + sum(metrics["dropped"].values()) == 200
    assert 5 <= len(selected.heldout) <= 40


def test_preparing_twice_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        prepare(tmp_path / name, "train[:50]", 0.2, near_duplicates=0.5, overlap_words=5)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_nothing_left_says_which_filter_took_how_many(tmp_path: Path) -> None:
    with pytest.raises(EmptyDataError, match=r"train: none of 2 rows is left \(dropped: 2 not text"):
        select_instructions(tmp_path, [row(1), row(2)])
    assert not (tmp_path / "out" / "train.json").exists()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"min_chars": 5, "max_chars": 4}, "min_chars 5 is over max_chars 4"),
        ({"max_tokens": 5}, "max_tokens: no tokenizer"),
        ({"benchmarks": ("a.json",)}, "overlap_words is not set"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rules: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InstructionRules(**rules)


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_the_params_refuse_a_fraction_out_of_range(fraction: float) -> None:
    import yaml

    good = yaml.safe_load((Path(SAMPLE).parents[2] / "params.yaml").read_text())["prepare_s1"]
    assert PrepareS1Params(**good).rules() == InstructionRules()
    with pytest.raises(ValueError, match="heldout_fraction"):
        PrepareS1Params(**{**good, "heldout_fraction": fraction})


def test_a_row_is_explained_with_the_rule_that_took_it(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row("a b"), row("a  b"), row("long enough"), row(3)])

    def explained(number: int) -> str:
        (line,) = explain_instructions(Dataset(str(path)), InstructionRules(max_chars=8), 0.0, 0, number)
        return line

    assert explained(0).startswith("row 0: kept for training (chars 3, instruction 'a b'")
    assert explained(1).startswith("row 1: dropped: duplicate (")
    assert explained(2).startswith("row 2: dropped: over max_chars (chars 11, instruction 'long enough'")
    assert explained(3).startswith("row 3: dropped: not text (")
    with pytest.raises(ValueError, match="--explain: found row 4, expected 0 to 3"):
        explained(4)


def test_a_sample_of_rejects_is_kept_with_reasons(tmp_path: Path) -> None:
    rows = [row(number) for number in range(50)] + [row("a"), row("a"), row("z" * 500)]
    select_instructions(tmp_path, rows, max_chars=400)
    rejects = read_json(tmp_path / "out" / "rejects.json")
    reasons = [reject["reason"] for reject in rejects]
    assert reasons == ["duplicate"] + ["not text"] * 20 + ["over max_chars"]
    assert (rejects[0]["row"], rejects[0]["instruction"]) == (51, "a")
    assert len(rejects[-1]["instruction"]) == 200


def test_mixed_types_in_a_json_column_are_counted_not_fatal(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [row("a"), row(3), row(["b"])])), encoding="utf-8")
    selected = prepared(prepare_instructions, path, "train", InstructionRules(), folder=tmp_path / "out")
    assert [record["instruction"] for record in selected.train] == ["a"]
    assert selected.dropped == {"not text": 2}
