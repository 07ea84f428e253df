import json
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from trainings import OURS, OUT, RECORDS, curve, files_of, reference_loss, train, write_job

from distill_app.core.models import check_checkpoint, load_trainable
from distill_app.training.examples import build_examples

LORA = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.0}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """An empty folder to train in."""
    monkeypatch.chdir(tmp_path)


def weights(folder):
    return dict(load_trainable(str(folder))[0].named_parameters())


def write_lora(student, lora=LORA, quantization="none", **training):
    sections = {"lora": lora, "models": {"quantization": quantization}}
    return write_job(student, sections=sections, num_train_epochs=6, logging_steps=1, **training)


@pytest.mark.parametrize("bf16", [False, True])
def test_adapters_learn_and_are_merged_into_a_plain_model(tiny_model_dir, bf16):
    train(write_lora(tiny_model_dir, bf16=bf16))
    points = curve(OUT)
    assert points[-1][1] < points[0][1] / 2
    check_checkpoint(OUT)
    assert not [name for name in files_of(OUT) if "adapter" in name]
    before, after = weights(tiny_model_dir), weights(OUT)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        is_target = "_proj" in name
        assert torch.equal(weight, after[name]) is not is_target, name
    model, tokenizer = load_trainable(OUT)
    examples = build_examples(RECORDS, tokenizer, OURS).train
    assert reference_loss(model, examples) < points[0][1] / 2
    assert json.loads(Path(OUT, "provenance.json").read_text())["lora"] == LORA


def test_adapters_go_where_the_config_says(tiny_model_dir):
    train(write_lora(tiny_model_dir, {**LORA, "target_modules": ["q_proj"]}))
    before, after = weights(tiny_model_dir), weights(OUT)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all("q_proj" in name for name in changed)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rang": 4}, r"s1\.json: lora: .*'rang'.*; mend the field"),
        ({"r": 0}, r"s1\.json: lora: .*; mend the field"),
        ({"target_modules": ["nothing"]}, r"s1\.json: lora: .*nothing.*; mend the field"),
    ],
)
def test_a_field_that_peft_refuses_is_named(tiny_model_dir, lora, message):
    with pytest.raises(ValueError, match=message):
        train(write_lora(tiny_model_dir, lora))
    assert not Path(OUT).exists()


def runs_quantized(quantization, folder):
    """Tell whether bitsandbytes multiplies and derives on this machine's CPU; why not, else nothing."""
    try:
        model, _ = load_trainable(str(folder), True, quantization)
        embedded = model.get_input_embeddings()(torch.tensor([[5, 6, 7]])).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.sum().backward()
    except (RuntimeError, NotImplementedError, ValueError, ImportError, AttributeError) as err:
        return " ".join(str(err).split())[:100] or type(err).__name__
    return ""


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_adapters_of_a_quantized_student_are_merged_into_its_own_weights(tmp_path, quantization):
    student = make_tiny_model(tmp_path / "model", layers=2, size=128)  # 4 bit takes 64 weights at a time
    if why := runs_quantized(quantization, student):
        pytest.skip(f"bitsandbytes has no {quantization} on this machine: {why}")
    train(write_lora(student, {**LORA, "target_modules": ["q_proj"]}, quantization))
    points = curve(OUT)
    assert points[-1][1] < points[0][1]
    before, after = weights(student), weights(OUT)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all("q_proj" in name for name in changed)
    assert all(weight.dtype == torch.float32 for weight in after.values())
