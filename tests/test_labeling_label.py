import copy
import json

import pytest
from fakes import Echo, label_folder, label_params, write_instructions

from distill_app import label_with_teacher, read_json
from distill_app.core.errors import EmptyDataError
from distill_app.generation.answers import Answer, Sampling
from distill_app.generation.in_process import InProcess
from distill_app.labeling.label import sampling_of, select_answers, tell_hosted_limits, tell_own_settings
from distill_app.labeling.store import AnswerStore

ITEMS = [{"instruction": "a", "input": "b"}, {"instruction": "c"}, {"instruction": "a", "input": "b"}]


def write_split(folder, split: str, tokens: list[int]) -> None:
    records = [{"instruction": f"say {n}", "input": str(t), "output": "x"} for n, t in enumerate(tokens)]
    (folder / f"{split}.json").write_text(json.dumps(records))


def test_labels_metrics_and_what_was_left_out_are_written(tmp_path, capsys):
    write_split(tmp_path, "train", [3, 0, 9, 4, -1, 8])
    write_split(tmp_path, "heldout", [2])
    metrics = label_folder(tmp_path, tmp_path / "s", Echo())
    assert read_json(tmp_path / "train_labeled.json")[0] == {
        "instruction": "say 0",
        "input": "3",
        "output": "say 0 3 at 0.0 in 3",
    }
    assert [r["instruction"][4:] for r in read_json(tmp_path / "train_labeled.json")] == ["0", "3", "5"]
    assert metrics["train"] == {
        "instructions": 6,
        "kept": 3,
        "dropped": {"empty": 1, "truncated": 1, "refused": 1},
        "tokens_in": 5 * 3 + 5,
        "tokens_out": 3 + 0 + 8 + 4 + 0 + 8,
        "tokens_mean": 3.8,
        "tokens_p95": 8,
    }
    assert metrics["heldout"]["kept"] == 1
    dropped = read_json(tmp_path / "dropped.json")
    assert [(d["split"], d["reason"], d["instruction"]) for d in dropped] == [
        ("train", "empty", "say 1"),
        ("train", "truncated", "say 2"),
        ("train", "refused", "say 4"),
    ]
    told = capsys.readouterr().err
    assert "label: train: left out (empty): say 1" in told
    assert "label: 3 instructions left out, all in " in told
    assert "7 asked" in (tmp_path / "label.log").read_text()


def test_the_files_are_those_of_save_json(tmp_path):
    write_instructions(tmp_path, 30, 8)
    label_folder(tmp_path, tmp_path / "s", Echo())
    for name in ("train_labeled", "heldout_labeled", "dropped"):
        content = (tmp_path / f"{name}.json").read_text()
        assert content == json.dumps(json.loads(content), ensure_ascii=False, indent=2) + "\n"


def test_keep_keeps_cut_answers_and_retry_asks_for_the_whole_of_them(tmp_path):
    write_split(tmp_path, "train", [3, 9, 20, 40])
    write_split(tmp_path, "heldout", [9])
    for changes, tokens in (
        ({"on_truncated": "drop"}, [3]),
        ({"on_truncated": "keep"}, [3, 8, 8, 8]),
        ({"on_truncated": "retry", "retry_max_new_tokens": 32}, [3, 9, 20]),
    ):
        write_split(tmp_path, "heldout", [1 if changes["on_truncated"] == "drop" else 9])
        metrics = label_folder(tmp_path, tmp_path / "s", Echo(), **changes)
        labeled = read_json(tmp_path / "train_labeled.json")
        assert [int(r["output"].split()[-1]) for r in labeled] == tokens
    assert metrics["train"]["dropped"] == {"empty": 0, "truncated": 1, "refused": 0}


def test_a_bound_of_retries_below_the_limit_is_told(tmp_path):
    write_split(tmp_path, "train", [3])
    write_split(tmp_path, "heldout", [3])
    with pytest.raises(
        ValueError, match=r"label\.retry_max_new_tokens: found 8, expected more than label\.max"
    ):
        label_folder(tmp_path, tmp_path / "s", Echo(), on_truncated="retry", retry_max_new_tokens=8)


def test_a_split_without_a_usable_answer_is_told_and_no_file_is_written(tmp_path):
    write_split(tmp_path, "train", [3])
    write_split(tmp_path, "heldout", [9, 0])
    with pytest.raises(EmptyDataError, match=r"no usable answer in heldout .*raise label\.max_new_tokens"):
        label_folder(tmp_path, tmp_path / "s", Echo())
    assert sorted(p.name for p in tmp_path.glob("*.json")) == ["heldout.json", "train.json"]


def test_a_fault_in_the_last_record_is_told_before_anything_is_asked(tmp_path):
    write_split(tmp_path, "train", [3])
    (tmp_path / "heldout.json").write_text(
        '[{"instruction": "a", "input": "1", "output": ""}, {"input": ""}]'
    )
    engine = Echo()
    with pytest.raises(ValueError, match=r'heldout\.json: record 1 has no "instruction"'):
        label_folder(tmp_path, tmp_path / "s", engine)
    assert engine.asked == []


def test_refused_answers_are_dropped_whatever_is_done_with_cut_ones():
    items = [{"instruction": "a"}, {"instruction": "b"}]
    kept, counts = select_answers(items, [Answer("no", 3, "refused"), Answer("yes", 3, "length")], "keep")
    assert [r["output"] for r in kept] == ["yes"] and counts["dropped"]["refused"] == 1


def refuse_to_generate(self, prompts, sampling):
    raise AssertionError("asked twice")


def test_a_model_in_memory_with_a_store_is_not_asked_twice(tiny, tmp_path, monkeypatch):
    first = label_with_teacher(*tiny, ITEMS, max_new_tokens=4, store=tmp_path / "s")
    assert first == label_with_teacher(*tiny, ITEMS, max_new_tokens=4)
    with AnswerStore(tmp_path / "s") as store:
        assert [s.answers for s in store.summaries()] == [2]
    monkeypatch.setattr(InProcess, "generate", refuse_to_generate)
    assert label_with_teacher(*tiny, ITEMS, max_new_tokens=4, store=tmp_path / "s") == first
    with pytest.raises(AssertionError, match="asked twice"):
        label_with_teacher(*tiny, ITEMS, max_new_tokens=4, seed=1, store=tmp_path / "s")


def test_labels_come_in_order_and_keep_instruction_and_input(tiny):
    exact = copy.deepcopy(tiny[0]).float(), tiny[1]  # in which no rounding flips a token
    items = [
        {"instruction": "a", "input": "b"},
        {"instruction": "c"},
        {"instruction": "a", "input": "b"},
    ]
    labeled = label_with_teacher(*exact, items, max_new_tokens=8)
    assert [(r["instruction"], r["input"]) for r in labeled] == [("a", "b"), ("c", ""), ("a", "b")]
    assert labeled[0]["output"] == labeled[2]["output"]
    assert labeled == label_with_teacher(*exact, items, max_new_tokens=8, batch_size=1)


def test_cut_and_empty_answers_are_dropped_and_counted():
    items = [{"instruction": str(n), "input": ""} for n in range(4)]
    answers = [
        Answer("yes", 2, "stop"),
        Answer("no", 9, "length"),
        Answer("", 1, "stop"),
        Answer("k", 4, "stop"),
    ]
    kept, counts = select_answers(items, answers, "drop")
    assert [r["output"] for r in kept] == ["yes", "k"]
    assert counts["dropped"] == {"empty": 1, "truncated": 1, "refused": 0}
    assert counts["instructions"] == 4 and counts["tokens_out"] == 16
    assert len(select_answers(items, answers, "keep")[0]) == 3


QWENS = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


def test_the_teachers_own_settings_are_used_or_left_and_told(tiny_copy, capsys):
    (tiny_copy / "generation_config.json").write_text(json.dumps({**QWENS, "eos_token_id": 2}))
    params = label_params(teacher=str(tiny_copy), top_p=0.8, stop=["x"])
    assert sampling_of(params) == Sampling(8, 0.0, 0.8, 17, stop=("x",))
    tell_own_settings(params)
    said = capsys.readouterr().err
    assert "own file says temperature 0.7, top_k 20, repetition_penalty 1.05, which label.gen" in said
    taken = params.model_copy(update={"generation_config": True})
    assert sampling_of(taken) == Sampling(8, 0.7, 0.8, 17, top_k=20, repetition_penalty=1.05, stop=("x",))
    tell_own_settings(taken)
    assert "1.05, which is used" in capsys.readouterr().err


def test_a_teacher_without_settings_of_its_own_is_asked_by_the_params(tiny_copy, capsys):
    for content in ('{"eos_token_id": 2}', None):
        path = tiny_copy / "generation_config.json"
        path.write_text(content) if content else path.unlink()
        params = label_params(teacher=str(tiny_copy), temperature=0.9, min_p=0.1, generation_config=True)
        assert sampling_of(params) == Sampling(8, 0.9, 1.0, 17, min_p=0.1)
        tell_own_settings(params)
        assert capsys.readouterr().err == ""
    (tiny_copy / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.7}')
    assert sampling_of(params).temperature == 0


def test_a_servers_own_settings_are_not_to_be_had():
    params = label_params(engine="openai", teacher="m", base_url="http://h/v1", generation_config=True)
    with pytest.raises(ValueError, match=r"label\.generation_config: found true with label\.engine: openai"):
        sampling_of(params)


def test_labels_are_drawn_as_the_params_say(tmp_path):
    write_split(tmp_path, "train", [3])
    write_split(tmp_path, "heldout", [2])
    engine, asked = Echo(), []
    generate = engine.generate
    engine.generate = lambda prompts, sampling: asked.append(sampling) or generate(prompts, sampling)
    changes = {"temperature": 0.5, "top_k": 7, "min_p": 0.2, "repetition_penalty": 1.1, "stop": ["a", "b"]}
    label_folder(tmp_path, tmp_path / "s", engine, **changes)
    assert asked == [Sampling(8, 0.5, 1.0, 17, True, 7, 0.2, 1.1, ("a", "b"))]


def test_what_a_hosted_teachers_verdict_cannot_have_is_said_before_the_first_label(capsys):
    tell_hosted_limits(label_params())
    assert capsys.readouterr().err == ""
    tell_hosted_limits(label_params(engine="openai", teacher="big", base_url="http://localhost:1/v1"))
    assert "big is behind a server" in (said := capsys.readouterr().err)
    assert "fidelity and benchmarks of choices need weights, which measure.teacher can name" in said
