import copy
import json
import shutil

import pytest
import torch
from fakes import Echo, label_folder, label_params, write_instructions

from distill_app import label_with_teacher, read_json
from distill_app.core.errors import EmptyDataError
from distill_app.labeling.answers import Answer, Sampling
from distill_app.labeling.engines import engine_identity, model_identity, open_engine, resolve_weights
from distill_app.labeling.in_process import InProcess
from distill_app.labeling.label import select_answers
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


def test_a_model_in_memory_is_known_by_its_config_and_parameters(tiny):
    model, tokenizer = tiny
    same, other = copy.deepcopy(model), copy.deepcopy(model)
    same.config._name_or_path = "elsewhere"
    with torch.no_grad():
        next(other.parameters()).view(-1)[-1] += 1
    assert model_identity(same, tokenizer) == model_identity(model, tokenizer)
    assert model_identity(other, tokenizer) != model_identity(model, tokenizer)
    same.config.rms_norm_eps = 0.1
    assert model_identity(same, tokenizer) != model_identity(model, tokenizer)


def test_a_checkpoint_is_known_by_its_files_and_not_by_its_place(tiny_copy, tmp_path):
    weights, _ = resolve_weights(str(tiny_copy), None)
    moved = shutil.copytree(tiny_copy, tmp_path / "moved" / "away")
    (moved / "README.md").write_text("not part of it")
    (moved / "provenance.json").write_text("{}")
    assert resolve_weights(str(moved), None) == (weights, None)
    with (moved / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert resolve_weights(str(moved), None)[0] != weights


def test_a_checkpoints_chat_template_is_part_of_it(tiny_copy):
    weights, _ = resolve_weights(str(tiny_copy), None)
    (tiny_copy / "chat_template.jinja").write_text("{{ messages }}")
    assert resolve_weights(str(tiny_copy), None)[0] != weights


def test_a_hub_model_is_known_by_the_commit_in_the_cache(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve_weights("org/name", None) == (f"org/name@{commit}", commit)
    assert resolve_weights("org/name", commit) == (f"org/name@{commit}", commit)
    with pytest.raises(
        OSError, match="org/name: not in the local cache and not to be had from the Hub"
    ) as caught:
        resolve_weights("org/name", "other")
    assert "\n" not in str(caught.value)


def test_an_engine_is_opened_without_loading_its_model(tiny_model_dir, monkeypatch):
    monkeypatch.setattr("distill_app.labeling.engines.load_teacher", refuse_to_generate)
    engine = open_engine(label_params(teacher=str(tiny_model_dir)))
    assert isinstance(engine, InProcess)
    assert engine.render("Hello", "", "system1").endswith("<s>assistant\n")
    assert engine.identity["weights"].startswith("sha256:")
    assert {k: engine.identity[k] for k in ("quantization", "dtype", "engine")} == {
        "quantization": "none",
        "dtype": "bfloat16",
        "engine": "transformers",
    }


def test_the_opened_engine_answers_as_its_model_does(tiny_model_dir, tiny):
    engine = open_engine(label_params(teacher=str(tiny_model_dir)))
    prompt = engine.render("Hello", "", "system1")
    (place, answer), *rest = engine.generate([prompt], Sampling(6))
    assert (place, rest) == (0, [])
    assert (
        answer.text
        == label_with_teacher(*tiny, [{"instruction": "Hello"}], max_new_tokens=6, temperature=0)[0]["output"]
    )


def test_what_changes_speed_alone_is_no_part_of_the_identity(tiny_model_dir):
    one = label_params(teacher=str(tiny_model_dir))
    two = label_params(teacher=str(tiny_model_dir), batch_size=3, engine_workers=2, concurrency=9, store="x")
    assert engine_identity(one) == engine_identity(two)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": "./none"}, FileNotFoundError, r"\./none: no such model folder"),
        ({"engine": "openai"}, ValueError, r"label\.base_url: found none, expected the server's address"),
        (
            {"engine": "openai", "base_url": "http://localhost:1/v1", "engine_workers": 2},
            ValueError,
            r"label\.engine_workers, label\.ray_address: found workers .* raise label\.concurrency",
        ),
        ({"engine": "vllm"}, ImportError, r"label\.engine: vllm is not installed"),
    ],
)
def test_an_engine_that_cannot_be_opened_is_told(tiny_model_dir, changes, error, message):
    with pytest.raises(error, match=message):
        open_engine(label_params(**{"teacher": str(tiny_model_dir), **changes}))
