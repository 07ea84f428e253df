import json
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from trainings import OURS, OUT, RECORDS, curve, files_of, reference_loss, train, write_job
from transformers import Qwen2Config, Qwen2ForCausalLM

from distill_app.core.models import check_checkpoint, load_trainable, save_checkpoint
from distill_app.easydistill.job import read_job
from distill_app.training.adapters import load_with_adapters, merged
from distill_app.training.examples import build_examples
from distill_app.training.losses import Objective, Teacher, summed_loss

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_adapters_go_where_the_config_says(tiny_model_dir):
    train(write_lora(tiny_model_dir, {**LORA, "target_modules": ["q_proj"]}))
    before, after = weights(tiny_model_dir), weights(OUT)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all("q_proj" in name for name in changed)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rang": 4}, r"s1\.json: lora: .*'rang'.*; fix the field"),
        ({"r": 0}, r"s1\.json: lora: .*; fix the field"),
        ({"target_modules": ["nothing"]}, r"s1\.json: lora: .*nothing.*; fix the field"),
        ({"lora_bias": True}, r"s1\.json: lora: lora_bias: found a bias beside .*_proj, .*; fix the field"),
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


@pytest.mark.slow
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


HEADS = {
    "adapter of the output layer": {"target_modules": ["lm_head"]},
    "all layers": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "output layer as a whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both as a whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "DoRA": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "rank-stabilised": {"target_modules": ["lm_head"], "use_rslora": True},
    "biases of adapters": {"target_modules": ["q_proj"], "lora_bias": True, "modules_to_save": ["lm_head"]},
    "biases": {"target_modules": ["q_proj", "lm_head"], "bias": "all"},
}


@pytest.fixture(scope="module")
def with_biases(tmp_path_factory):
    """A tiny Qwen2, whose attention has biases; its output layer has weights of its own."""
    folder = make_tiny_model(tmp_path_factory.mktemp("qwen") / "model", layers=2)
    tokenizer = load_trainable(str(folder))[1]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.3, **sizes)
    save_checkpoint(Qwen2ForCausalLM(config), tokenizer, folder)
    return folder


def moved(model):
    """Move every weight that is trained to where no adapter begins; return the model in float64."""
    model = model.double()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    return model


@pytest.mark.parametrize("lora", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("kd_ratio", [0.0, 0.5])
def test_gradients_through_any_output_layer_are_those_of_a_plain_loss_in_float64(with_biases, lora, kd_ratio):
    job = read_job(write_lora(with_biases, {**LORA, **lora}))
    model = moved(load_with_adapters(job))
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 300, (1, 300), generator=draw)
    targets = torch.randint(5, 300, (300,), generator=draw)
    teacher = Teacher(
        torch.arange(4).expand(300, 4), torch.full((300, 4), -2.0), torch.full((300,), -0.8), targets > 50
    )
    objective = Objective(kd_ratio, vocab_size=350)
    base = model.get_base_model()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def gradients(loss_of):
        hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        loss = loss_of(hidden, base.get_output_embeddings())
        return loss.item(), torch.autograd.grad(loss, list(trained.values()), allow_unused=True)

    found, ours = gradients(
        lambda hidden, head: summed_loss(hidden, head, targets, objective, teacher, scale=0.25)
    )
    expected, theirs = gradients(
        lambda hidden, head: objective.token_losses(head(hidden), targets, teacher).sum() * 0.25
    )
    assert found == pytest.approx(expected, rel=1e-5)
    for name, one, two in zip(trained, ours, theirs, strict=True):
        assert one is not None and one.abs().max() > 0, name
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-4 * two.abs().max()), name


@pytest.mark.parametrize("lora", HEADS.values(), ids=HEADS)
def test_what_adapters_learned_is_in_the_merged_model(with_biases, lora):
    job = read_job(write_lora(with_biases, {**LORA, **lora}))
    model = moved(load_with_adapters(job))
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        plain = load_trainable(str(with_biases))[0].double()(input_ids=ids).logits
        whole = merged(model, job).double()(input_ids=ids).logits
    assert (trained - plain).abs().max() > 0.1
    assert torch.allclose(whole, trained, atol=1e-3)


@pytest.mark.slow
def test_adapters_of_the_output_layer_alone_learn(tiny_model_dir):
    train(write_lora(tiny_model_dir, {**LORA, "target_modules": ["lm_head"]}))
    points = curve(OUT)
    assert points[-1][1] < 0.8 * points[0][1]
    before, after = weights(tiny_model_dir), weights(OUT)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("lora", "place"),
    [
        ({"target_modules": ["lm_head"]}, "output layer"),
        ({"target_modules": ["embed_tokens"]}, "embeddings"),
        ({"modules_to_save": ["lm_head"]}, "output layer"),
        ({"modules_to_save": ["embed_tokens"]}, "embeddings"),
        ({"trainable_token_indices": [3, 4]}, "output layer|embeddings"),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "output layer|embeddings"),
    ],
)
def test_adapters_on_weights_that_two_layers_share_are_refused(tiny_copy, lora, place):
    config = json.loads((tiny_copy / "config.json").read_text())
    (tiny_copy / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    message = (
        rf"lora: found adapters on the ({place}), expected none: .* share their weights, .*; fix the field"
    )
    with pytest.raises(ValueError, match=message):
        train(write_lora(tiny_copy, {**LORA, "target_modules": ["q_proj"], **lora}))
