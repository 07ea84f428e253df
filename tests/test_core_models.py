import copy
import json

import pytest
import torch
from fakes import label_params

from distill_app import load_student, load_teacher
from distill_app.core.models import check_checkpoint, compute_dtype
from distill_app.generation.identity import engine_identity


def test_a_checkpoint_comes_back_as_it_was_saved(tiny_model_dir, tiny):
    model, tokenizer = tiny
    again, _ = load_student(str(tiny_model_dir))
    ids = tokenizer("Name three fruits", return_tensors="pt")["input_ids"]
    assert torch.equal(copy.deepcopy(model).to(again.dtype)(ids).logits, again(ids).logits)
    assert tokenizer.pad_token is not None


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [({"avx2": True}, "float32"), ({"avx512_bf16": True}, "bfloat16"), ({"amx_tile": True}, "bfloat16")],
)
def test_a_cpu_without_bfloat16_products_computes_in_float32(flags, dtype, tiny_model_dir, monkeypatch):
    """Torch does them there one by one: an eighth of float32's speed."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert compute_dtype() == dtype
    assert load_student(str(tiny_model_dir))[0].dtype == getattr(torch, dtype)
    assert engine_identity(label_params(teacher=str(tiny_model_dir)))[0]["dtype"] == dtype


def test_a_checkpoint_carries_the_keys_that_transformers_4_reads(tiny_model_dir):
    config = json.loads((tiny_model_dir / "config.json").read_text())
    tokenizer = json.loads((tiny_model_dir / "tokenizer_config.json").read_text())
    assert config["rope_theta"] == 100000.0
    assert config["torch_dtype"] == "bfloat16"
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["chat_template"]
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]


def test_nothing_in_a_checkpoint_tells_where_it_was_made(tiny_model_dir):
    for path in tiny_model_dir.glob("*.json"):
        assert str(tiny_model_dir.parent) not in path.read_text(encoding="utf-8")


def test_pad_becomes_eos_where_it_is_unset(tiny_copy):
    path = tiny_copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("pad_token")
    path.write_text(json.dumps(config))
    _, tokenizer = load_student(str(tiny_copy))
    assert tokenizer.pad_token == tokenizer.eos_token


def test_the_teacher_loads_in_8_bit_by_default(tiny_model_dir):
    model, tokenizer = load_teacher(str(tiny_model_dir))
    assert model.is_loaded_in_8bit
    ids = tokenizer("Name three", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids.to(model.device)).logits).all()


@pytest.mark.parametrize("name", ["models/none", "./none", "/none/at/all"])
def test_a_model_path_that_does_not_exist_is_told_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{name}: no such model folder"):
        load_student(name)


def test_a_folder_that_is_no_checkpoint_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json in it"):
        load_teacher(str(tmp_path), quantization="none")


def test_an_unknown_quantization_is_refused(tiny_model_dir):
    with pytest.raises(ValueError, match='quantization: found "3bit"'):
        load_teacher(str(tiny_model_dir), quantization="3bit")


def test_cut_weights_are_found(tiny_copy):
    check_checkpoint(tiny_copy)
    weights = tiny_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="unreadable weights"):
        check_checkpoint(tiny_copy)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no \\*.safetensors file"):
        check_checkpoint(tiny_copy)


def test_a_lost_shard_is_found(tiny_copy):
    index = {
        "metadata": {},
        "weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    (tiny_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors is missing"):
        check_checkpoint(tiny_copy)
