"""The public functions, to the letter of their contract."""

import inspect
import json
import tracemalloc
from pathlib import Path

import pytest

import distill_app
from distill_app import (
    compare_models,
    distill_system1,
    distill_system2,
    prepare_system1_dataset,
    prepare_system2_dataset,
)
from distill_app.api import _can_train
from distill_app.generation.batch import Answer

ROOT = Path(__file__).parents[1]
RECORDS = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(8)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", distill_app.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert inspect.getdoc(getattr(distill_app, name))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'distil'"):
        _ = distill_app.distil


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "label_with_teacher",
            {
                "batch_size": 2,
                "max_new_tokens": 256,
                "temperature": 0.8,
                "top_p": 0.9,
                "mode": "system1",
            },
        ),
        ("format_prompt", {"input_text": "", "mode": "system1"}),
        ("infer_student", {"mode": "system1", "max_new_tokens": 256}),
        (
            "compare_models",
            {
                "teacher_path": "Qwen/Qwen2.5-7B-Instruct",
                "system1_path": "./distilled-qwen2.5-0.5b",
                "system2_path": "./distilled-qwen2.5-1.5b-cot",
                "teacher_model": None,
                "sys2_tokenizer": None,
                "max_tokens_teacher": 256,
                "max_tokens_sys1": 256,
                "max_tokens_sys2": 256,
            },
        ),
        ("load_teacher", {"quantization": "8bit"}),
    ],
)
def test_defaults_are_those_of_the_contract(name, expected):
    parameters = inspect.signature(getattr(distill_app, name)).parameters
    assert {k: parameters[k].default for k in expected} == expected


@pytest.mark.parametrize("distill", [distill_system1, distill_system2])
@pytest.mark.parametrize("student", ["", "nonsense", "./none", None, "a/b/c"])
def test_an_invalid_student_is_told_with_an_example(folder, capsys, distill, student):
    assert distill({"student_model": student}) is None
    out = capsys.readouterr().out
    assert f"Invalid student model: {student}\n" in out and "Qwen/Qwen2.5-" in out
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("content", [None, "[]"])
def test_missing_or_empty_data_is_told(folder, capsys, content):
    if content is not None:
        (folder / "d.json").write_text(content)
    assert distill_system1({"labeled_path": "d.json"}) is None
    assert distill_system2({"cot_path": "d.json"}) is None
    assert capsys.readouterr().out == "No data for System 1 distillation\nNo data for System 2 distillation\n"


def test_malformed_data_is_told_with_its_line(folder, capsys):
    (folder / "d.json").write_text("[\n{]")
    assert distill_system1({"labeled_path": "d.json"}) is None
    assert "d.json: line 2" in capsys.readouterr().out


@pytest.mark.slow
def test_distil_system2_writes_its_config_and_returns_the_checkpoint(folder, tiny_model_dir):
    (folder / "d.json").write_text(json.dumps(RECORDS))
    out = distill_system2(
        {
            "student_model": str(tiny_model_dir),
            "cot_path": "d.json",
            "out_dir": "out",
            "config_path": "c/s2.json",
            "backend": "builtin",
        }
    )
    assert out == "out"
    assert json.loads(Path("c/s2.json").read_text())["job_type"] == "kd_black_box_train_only"
    reply = distill_app.infer_student(*distill_app.load_student("out"), "Say 3.", max_new_tokens=3)
    assert isinstance(reply, str) and "Assistant:" not in reply


@pytest.mark.slow
def test_distil_system1_returns_the_checkpoint(folder, tiny_model_dir):
    (folder / "d.json").write_text(json.dumps(RECORDS))
    config = {"student_model": str(tiny_model_dir), "labeled_path": "d.json", "backend": "builtin"}
    assert distill_system1(config) == "./distilled-qwen2.5-0.5b"
    assert Path("configs/kd_black_box_qwen_0_5b.json").is_file()
    assert Path("distilled-qwen2.5-0.5b/model.safetensors").is_file()


@pytest.mark.slow
def test_distil_system1_returns_none_when_the_training_fails(folder, tiny_model_dir, capfd):
    (folder / "d.json").write_text(json.dumps(RECORDS))
    config = {
        "student_model": str(tiny_model_dir),
        "labeled_path": "d.json",
        "training": {"max_length": 1},
        "backend": "builtin",
    }
    assert distill_system1(config) is None
    assert "over 1 tokens" in capfd.readouterr().err
    assert not Path("distilled-qwen2.5-0.5b").exists()


def test_prepare_system1_writes_both_files(folder):
    prepare_system1_dataset(slice_str="train[:5]", dataset=str(ROOT / "data/sample/DistilQwen_100k"))
    records = distill_app.read_json("data/train_labeled.json")
    assert len(records) == 5 and set(records[0]) == {"instruction", "input", "output"}
    assert distill_app.read_json("data/train_instructions.json") == records


def test_prepare_system1_can_relabel_and_leaves_out_cut_and_empty_answers(folder, tiny, monkeypatch, capsys):
    answers = [Answer("", 1, "stop"), Answer("Yes.", 2, "stop"), Answer("And", 256, "length")]
    monkeypatch.setattr("distill_app.api.ask_teacher", lambda *_: answers)
    prepare_system1_dataset(
        "train[:3]", *tiny, relabel_with_teacher=True, dataset=str(ROOT / "data/sample/DistilQwen_100k")
    )
    own, teacher = (distill_app.read_json(f"data/train_{n}.json") for n in ("instructions", "labeled"))
    assert len(own) == 3 and [r["output"] for r in teacher] == ["Yes."]
    assert teacher[0]["instruction"] == own[1]["instruction"]
    assert capsys.readouterr().out == "2 of 3 instructions left out: no whole answer\n"


def test_a_row_without_an_answer_is_no_label_and_is_told(folder, capsys):
    Path("rows.jsonl").write_text('{"instruction": "a", "output": ""}\n{"instruction": "b", "output": "c"}\n')
    prepare_system1_dataset(slice_str="train", dataset="./rows.jsonl")
    assert [r["instruction"] for r in distill_app.read_json("data/train_labeled.json")] == ["b"]
    assert "1 of 2 instructions left out" in capsys.readouterr().out


def test_an_empty_slice_is_told_and_nothing_written(folder, capsys):
    prepare_system1_dataset(slice_str="train[:0]", dataset=str(ROOT / "data/sample/DistilQwen_100k"))
    assert capsys.readouterr().out == "No data for System 1 distillation\n"
    assert not Path("data").exists()


def test_prepare_system2_applies_its_bounds(folder):
    sample = str(ROOT / "data/sample/OmniThought")
    prepare_system2_dataset(rv_min=7, cd_min=5, dataset=sample, out_cot="long.json")
    prepare_system2_dataset(rv_max=3, max_traces=1, dataset=sample, out_cot="short.json")
    long, short = (distill_app.read_json(f"{n}.json") for n in ("long", "short"))
    mean = [sum(len(r["output"]) for r in records) / len(records) for records in (long, short)]
    assert mean[0] > 2 * mean[1] and len(short) == 560


def test_prepare_system2_prints_what_it_left_out_and_why(folder, capsys):
    rows = [{"question": "a", "cot": "b", "rv_score": level} for level in (1, 1, 9)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_system2_dataset("train", rv_max=5, dataset="./rows.jsonl")
    assert capsys.readouterr().out == "2 of 3 traces left out: 1 RV out of bounds, 1 duplicate\n"
    prepare_system2_dataset("train[:1]", rv_max=5, dataset="./rows.jsonl")
    assert capsys.readouterr().out == ""


def test_prepare_system1_prints_what_it_left_out_and_why(folder, capsys):
    Path("rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 2)
    prepare_system1_dataset("train", dataset="./rows.jsonl")
    assert capsys.readouterr().out == "1 of 2 rows left out: 1 duplicate\n"


@pytest.mark.slow
def test_data_is_read_as_a_stream_before_a_training_and_when_it_is_prepared(folder):
    with Path("rows.jsonl").open("w") as file:
        for n in range(20_000):
            file.write(json.dumps({"instruction": f"{n}", "input": "", "output": "x" * 2000}) + "\n")
    prepare_system1_dataset("train[:10]", dataset="./rows.jsonl")  # imports
    tracemalloc.start()
    try:
        assert _can_train("1", "owner/model", "rows.jsonl")
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
        tracemalloc.reset_peak()
        prepare_system1_dataset("train", dataset="./rows.jsonl")
        assert tracemalloc.get_traced_memory()[1] < 36_000_000
    finally:
        tracemalloc.stop()
    assert len(distill_app.read_json("data/train_labeled.json")) == 20_000


def test_an_unknown_omnithought_schema_is_told_and_nothing_written(folder, capsys):
    Path("rows.jsonl").write_text('{"colour": "red"}\n')
    prepare_system2_dataset(dataset="./rows.jsonl")
    assert capsys.readouterr().out == "Unexpected OmniThought schema, please inspect omni[0]\n"
    assert not Path("data").exists()


def test_compare_models_prints_prompt_and_answers(tiny, capsys):
    compare_models(
        ["Say one."],
        teacher_model=tiny[0],
        teacher_tokenizer=tiny[1],
        sys1_model=tiny[0],
        sys1_tokenizer=tiny[1],
        sys2_model=tiny[0],
        sys2_tokenizer=tiny[1],
        max_tokens_teacher=3,
        max_tokens_sys1=3,
        max_tokens_sys2=3,
    )
    lines = capsys.readouterr().out.splitlines()
    heads = ["Prompt: Say one.", "Teacher:", "System 1 student:", "System 2 student:"]
    assert [head for head in heads if not any(line.startswith(head) for line in lines)] == []


def test_a_model_that_is_missing_or_broken_is_skipped(folder, tiny_copy, capsys):
    (tiny_copy / "model.safetensors").write_bytes(b"broken")
    compare_models(["Say one."], teacher_path=None, system1_path="./none", system2_path=str(tiny_copy))
    out = capsys.readouterr().out
    assert "Model not found at ./none\n" in out and f"Model not found at {tiny_copy}\n" in out
    assert "Prompt: Say one." in out and "System 1 student" not in out
