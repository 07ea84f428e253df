"""Whole trainings of the tiny student."""

import json
from pathlib import Path

import pytest
import torch
from trainings import (
    OURS,
    OUT,
    RECORDS,
    curve,
    dtypes_of,
    files_of,
    reference_loss,
    train,
    write_job,
)
from transformers import AutoModelForCausalLM, Qwen2Config

from distill_app import load_student, run_easy_distill
from distill_app.core.models import load_trainable, save_checkpoint
from distill_app.core.prompts import chat_template
from distill_app.core.stage import report_errors
from distill_app.easydistill.job import read_job
from distill_app.training.batches import Collator, StepBatches
from distill_app.training.config import objective_of, sft_arguments, token_budget
from distill_app.training.examples import build_examples
from distill_app.training.memory import tokens_at_a_time
from distill_app.training.trainer import DistillationTrainer, check_output_layer


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """An empty folder to train in."""
    monkeypatch.chdir(tmp_path)


def change_config(path, **sections):
    config = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps({**config, **sections}))


@pytest.mark.slow
def test_training_writes_a_checkpoint_that_learned_and_tells_its_origin(tiny_model_dir):
    assert run_easy_distill(write_job(tiny_model_dir, logging_steps=1)) == 0
    tokenizer = load_student(OUT)[1]
    assert dtypes_of(OUT) == {torch.bfloat16}
    assert tokenizer.chat_template == chat_template("system1")
    points = curve(OUT)
    assert [step for step, _ in points] == [1, 2, 3, 4, 5, 6]
    assert points[-1][1] < points[0][1] / 2
    assert Path(OUT, "validation.csv").read_text() == "step,loss\n"
    metrics = json.loads(Path(OUT, "metrics.json").read_text())
    assert metrics == {"steps": 6, "training_loss": points[-1][1]}
    origin = json.loads(Path(OUT, "provenance.json").read_text())
    assert origin["student"]["model"] == str(tiny_model_dir)
    assert origin["data"]["path"] == "data/labeled.json"
    assert origin["examples"] == {"train": 12, "validation": 0, "too_long_dropped": 0, "too_long_cut": 0}
    assert "output_dir" not in origin["training"] and origin["training"]["learning_rate"] == 1e-2
    assert not list(Path("models").glob(".*")) and not list(Path("work").rglob("checkpoint-*"))


def test_two_trainings_give_the_same_bytes_and_another_seed_gives_others(tiny_model_dir):
    found = [files_of(train(write_job(tiny_model_dir))) for _ in range(2)]
    assert found[0] == found[1]
    path = write_job(tiny_model_dir, sections={"dataset": {"seed": 7}})
    other = files_of(train(path))
    assert found[0]["model.safetensors"] != other["model.safetensors"]


@pytest.mark.slow
def test_a_bfloat16_training_learns_as_a_float32_one_does(tiny_model_dir):
    curves = []
    for bf16 in (False, True):
        curves.append(
            curve(train(write_job(tiny_model_dir, bf16=bf16, learning_rate=2e-3, num_train_epochs=4)))
        )
    for (_, one), (_, other) in zip(*curves, strict=True):
        assert other == pytest.approx(one, rel=0.05)
    assert curves[1][-1][1] < curves[1][0][1] / 2


@pytest.mark.slow
def test_a_curve_holds_means_over_so_many_steps_and_ends_with_the_last(tiny_model_dir):
    every = curve(train(write_job(tiny_model_dir, logging_steps=1)))
    fourth = curve(train(write_job(tiny_model_dir, logging_steps=4)))
    losses = [loss for _, loss in every]
    assert [step for step, _ in fourth] == [4, 6]
    assert fourth[0][1] == pytest.approx(sum(losses[:4]) / 4, abs=1e-4)
    assert fourth[1][1] == pytest.approx(sum(losses[4:]) / 2, abs=1e-4)
    assert len(curve(train(write_job(tiny_model_dir, logging_steps=100)))) == 1


def make_trainer(student, budget=None, tokens_per_step=None, **training):
    """Return a trainer in float32, ready for a step."""
    records = [{**RECORDS[0], "output": "It is. " * n} for n in (1, 2, 8, 20)]
    job = read_job(
        write_job(student, records, optim="sgd", max_grad_norm=0.0, learning_rate=1e-3, **training)
    )
    model, tokenizer = load_trainable(str(student))
    examples = build_examples(records, tokenizer, OURS).train
    trainer = DistillationTrainer(
        model,
        objective_of(job, None, None),
        budget or token_budget(job),
        tokens_per_step=tokens_per_step,
        args=sft_arguments(job, "scratch"),
        data_collator=Collator(),
        train_dataset=examples,
    )
    return trainer, examples


@pytest.mark.slow
def test_what_a_step_learns_depends_on_neither_batch_nor_budget(tiny_model_dir):
    """Answers of very different length: means of means would differ."""
    weights, losses = [], []
    for batch, steps, budget in ((4, 1, 10_000), (1, 4, 10_000), (2, 2, 40), (4, 1, 1)):
        trainer, _ = make_trainer(
            tiny_model_dir,
            budget,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            num_train_epochs=2,
        )
        trainer.train()
        assert trainer.state.global_step == 2
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        losses.append(trainer.state.log_history[0]["loss"])
    before = torch.cat([p.detach().flatten() for p in load_trainable(str(tiny_model_dir))[0].parameters()])
    assert (weights[0] - before).abs().max() > 1e-3
    for other, loss in zip(weights[1:], losses[1:], strict=True):
        assert torch.allclose(weights[0], other, atol=1e-5)
        assert loss == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_gradient_checkpointing_is_one_key_of_the_config(tiny_model_dir):
    plain = curve(train(write_job(tiny_model_dir, max_length=60)))
    trainer, _ = make_trainer(tiny_model_dir, gradient_checkpointing=True)
    trainer.train()
    assert trainer.model.is_gradient_checkpointing
    for options in ({}, {"sections": {"lora": {"r": 4}}, "learning_rate": 5e-2}):
        points = [
            curve(train(write_job(tiny_model_dir, max_length=60, gradient_checkpointing=on, **options)))
            for on in (False, True)
        ]
        assert points[0] == points[1] and points[0][-1][1] < points[0][0][1]
    assert points[0] != plain


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_one_process_trains_on_one_gpu_however_many_are_visible(tiny_model_dir, monkeypatch, gpus):
    """The Trainer would wrap the model in DataParallel, which crashes in the first step."""
    expected = curve(train(write_job(tiny_model_dir)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert curve(train(write_job(tiny_model_dir, use_cpu=False))) == expected


def test_deepspeed_is_refused_before_the_student_is_loaded(tiny_model_dir, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="does not run under DeepSpeed; use accelerate: fsdp"):
        train(write_job("models/none"))


@pytest.mark.slow
def test_steps_hold_about_so_many_tokens_and_each_example_once_an_epoch(tiny_model_dir, capfd):
    trainer, examples = make_trainer(tiny_model_dir, tokens_per_step=90)
    trainer.train_dataset = examples = [*examples] * 3  # so that there are several steps
    lengths = [len(example.input_ids) for example in examples]
    batches = trainer.step_batches()
    assert len(batches) == min(-(-sum(lengths) // 90), sum(lengths) // max(lengths)) > 1
    orders = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        steps = list(batches)
        assert len(steps) == len(batches) and all(steps)
        assert sorted(place for step in steps for place in step) == list(range(len(lengths)))
        orders.append(steps)
    assert orders[0] != orders[1]
    train(write_job(tiny_model_dir, sections={"batching": {"tokens_per_step": 90, "tokens_at_a_time": 35}}))
    assert (
        "5 steps an epoch of about 74 tokens" in (err := capfd.readouterr().err)
        and "at most 35 at a time on cpu" in err
    )
    steps = json.loads(Path(OUT, "metrics.json").read_text())["steps"]
    assert f"{steps // 2} steps an epoch" in err


@pytest.mark.parametrize(
    ("lengths", "tokens"), [([5], 100), ([1000, 1, 1], 10), ([3] * 50, 7), ([9, 1] * 9, 10)]
)
def test_no_step_is_without_an_example(lengths, tokens):
    for seed in range(20):
        steps = list(StepBatches(lengths, 8, tokens, seed))
        assert all(steps) and sorted(p for s in steps for p in s) == list(range(len(lengths)))


def test_processes_share_each_step_evenly_and_none_is_left_out():
    lengths = [(7 * n) % 23 + 1 for n in range(13)]
    shares = [list(StepBatches(lengths, 12, None, 3, 4, process)) for process in range(4)]
    (alone,) = (list(StepBatches(lengths, 12, None, 3)) for _ in range(1))
    for number, step in enumerate(alone):
        mine = [share[number] for share in shares]
        counted = [p for share in mine for p in share if p < len(lengths)]
        assert sorted(counted) == sorted(step)
        assert all(share == [len(lengths)] or max(share) < len(lengths) for share in mine)
    first = [sum(lengths[p] for p in share[0]) for share in shares]
    assert max(first) - min(first) <= max(lengths) / 2


@pytest.mark.slow
def test_out_of_memory_halves_the_tokens_at_a_time_and_changes_nothing_learned(
    tiny_model_dir, monkeypatch, capfd
):
    """It runs out in the backward pass of a step's last part: the gradients before it are not counted twice."""
    weights = []
    for room in (10_000, 200):
        trainer, _ = make_trainer(tiny_model_dir, 10_000, per_device_train_batch_size=4, num_train_epochs=2)
        real = trainer.compute_loss

        def limited(model, inputs, room=room, real=real, **options):
            if inputs["labels"].shape[1] > room:
                real(model, inputs, **options).backward()
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(model, inputs, **options)

        monkeypatch.setattr(trainer, "compute_loss", limited)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert trainer.tokens_at_a_time < 200
    assert f"going on with {trainer.tokens_at_a_time}" in capfd.readouterr().err
    assert torch.allclose(*weights, atol=1e-5)


def test_out_of_memory_with_one_example_says_what_to_do(tiny_model_dir, monkeypatch):
    trainer, _ = make_trainer(tiny_model_dir, 10_000, per_device_train_batch_size=4)

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "compute_loss", full)
    with pytest.raises(ValueError, match="lower batching.tokens_at_a_time or training.max_length, or set"):
        trainer.train()


def test_a_gpu_takes_what_its_memory_holds(tiny_model_dir):
    from types import SimpleNamespace

    from distill_app.training.memory import tokens_that_fit

    config = Qwen2Config(
        num_hidden_layers=24, hidden_size=896, intermediate_size=4864, num_attention_heads=14
    )
    config.num_key_value_heads = 2
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fits = [tokens_that_fit(model, memory * 10**9, True, False) for memory in (4, 16, 40, 80)]
    assert fits[0] == 0 and fits == sorted(fits) and 8_000 < fits[2] < 20_000 < fits[3]
    assert tokens_that_fit(model, 40 * 10**9, True, True) > 5 * fits[2]
    job = read_job(write_job(tiny_model_dir, per_device_train_batch_size=1, max_length=512))
    arguments = SimpleNamespace(device=torch.device("cuda"), gradient_checkpointing=False, fsdp="")
    with pytest.MonkeyPatch.context() as patch:
        for memory, expected in ((4, 512), (40, fits[2])):
            properties = SimpleNamespace(total_memory=memory * 10**9)
            patch.setattr(torch.cuda, "get_device_properties", lambda device, it=properties: it)
            assert tokens_at_a_time(job, model, arguments, True) == expected
    arguments.device = torch.device("cpu")
    assert tokens_at_a_time(job, model, arguments, True) == 512


def test_a_steps_loss_is_that_of_a_float64_reference(tiny_model_dir):
    trainer, examples = make_trainer(tiny_model_dir, 60, per_device_train_batch_size=4)
    expected = reference_loss(load_trainable(str(tiny_model_dir))[0], examples)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_losses_of_prompts_too_are_learned_where_the_config_says_so(tiny_model_dir):
    examples = build_examples(RECORDS, load_student(str(tiny_model_dir))[1], OURS, response_only=False).train
    expected = reference_loss(load_trainable(str(tiny_model_dir))[0], examples)
    path = write_job(tiny_model_dir, completion_only_loss=False, per_device_train_batch_size=12)
    assert curve(train(path))[0][1] == pytest.approx(expected, abs=2e-4)


@pytest.mark.slow
def test_the_checkpoint_holds_the_trained_weights(tiny_model_dir):
    """Its loss is what one more evaluation of the trainer would have found."""
    train(write_job(tiny_model_dir, num_train_epochs=4))
    model, tokenizer = load_trainable(OUT)
    examples = build_examples(RECORDS, tokenizer, OURS).train
    before = reference_loss(load_trainable(str(tiny_model_dir))[0], examples)
    assert reference_loss(model, examples) < before / 3


VALIDATED = {"validation": {"fraction": 0.3}}


def held_out(tokenizer, records=RECORDS):
    return build_examples(records, tokenizer, OURS, validation_fraction=0.3, seed=42)


@pytest.mark.slow
def test_held_out_examples_are_not_learned_and_their_loss_is_that_of_the_words(tiny_model_dir):
    # Enough of them that what rounding to bfloat16 does to each averages out
    records = [{**RECORDS[n % 12], "instruction": f"Name number {n}."} for n in range(40)]
    options = {"sections": VALIDATED, "save_steps": 2, "num_train_epochs": 3, "learning_rate": 1e-3}
    train(write_job(tiny_model_dir, records, **options))
    model, tokenizer = load_trainable(OUT)
    found = held_out(tokenizer, records)
    assert 8 < len(found.validation) < len(records) / 2
    points = curve(OUT, "validation")
    last = curve(OUT)[-1][0]
    assert [step for step, _ in points] == [*range(2, last, 2), last]
    metrics = json.loads(Path(OUT, "metrics.json").read_text())
    assert metrics["best_step"] == last and metrics["validation_loss"] == points[-1][1]
    # The checkpoint is rounded to bfloat16
    assert points[-1][1] < points[-2][1] * 0.99  # a checkpoint of other steps would be seen
    assert reference_loss(model, found.validation) == pytest.approx(points[-1][1], rel=2e-3)
    counts = json.loads(Path(OUT, "provenance.json").read_text())["examples"]
    assert (counts["train"], counts["validation"]) == (len(found.train), len(found.validation))


@pytest.mark.slow
def test_the_weights_of_the_best_evaluation_are_kept(tiny_model_dir):
    """At such a learning rate the held-out loss soon rises."""
    train(write_job(tiny_model_dir, sections=VALIDATED, save_steps=1, num_train_epochs=6, learning_rate=0.05))
    points = curve(OUT, "validation")
    best = min(points, key=lambda point: point[1])
    assert points[0] != best != points[-1] and points[-1][1] > best[1] * 1.1
    metrics = json.loads(Path(OUT, "metrics.json").read_text())
    assert (metrics["best_step"], metrics["validation_loss"]) == best
    model, tokenizer = load_trainable(OUT)
    loss = reference_loss(model, held_out(tokenizer).validation)
    assert loss == pytest.approx(best[1], rel=0.01)


def test_without_a_better_evaluation_patience_ends_the_training(tiny_model_dir):
    sections = {"validation": {"fraction": 0.3, "patience": 2}}
    train(write_job(tiny_model_dir, sections=sections, save_steps=1, num_train_epochs=20, learning_rate=0.05))
    points = curve(OUT, "validation")
    metrics = json.loads(Path(OUT, "metrics.json").read_text())
    assert metrics["steps"] == points[-1][0] == metrics["best_step"] + 2 < 60
    assert all(loss >= metrics["validation_loss"] for _, loss in points[-2:])


def test_the_best_step_is_told_from_more_digits_than_are_written():
    from types import SimpleNamespace

    from distill_app.training.train import _save_records

    log = [
        {"step": 1, "loss": 2.0},
        {"step": 1, "eval_loss": 1.00004},
        {"step": 2, "loss": 2.0},
        {"step": 2, "eval_loss": 1.00001},
    ]
    state = SimpleNamespace(log_history=log, global_step=2, best_global_step=2, best_metric=1.00001)
    job = SimpleNamespace(training={"logging_steps": 1})
    _save_records(job, state, Path())
    assert json.loads(Path("metrics.json").read_text())["best_step"] == 2


@pytest.mark.slow
def test_too_long_examples_are_counted_where_a_person_and_a_reader_see_it(tiny_model_dir, capfd):
    records = [*RECORDS, {**RECORDS[0], "output": "It is. " * 40}]
    for too_long, key, told in (("drop", "too_long_dropped", "left out"), ("cut", "too_long_cut", "cut")):
        train(write_job(tiny_model_dir, records, max_length=64, sections={"dataset": {"too_long": too_long}}))
        assert json.loads(Path(OUT, "provenance.json").read_text())["examples"][key] == 1
        assert f"1 longer than 64 tokens {told}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda student: Path("data/labeled.json").write_text("[{]"), "data/labeled.json: line 1"),
        (lambda student: Path("configs/s1.jinja").unlink(), r"configs/s1.jinja: no such file"),
        (lambda student: write_job("models/none"), "models/none: no such model folder"),
        (lambda student: write_job(student, max_length=8), "over 8 tokens .*; raise training.max_length"),
        (lambda student: write_job(student, eval_strategy="steps"), "eval"),
    ],
)
def test_a_training_that_cannot_be_says_why_and_leaves_nothing(tiny_model_dir, break_it, message):
    path = write_job(tiny_model_dir)
    Path("models").mkdir()
    break_it(tiny_model_dir)
    with pytest.raises((ValueError, OSError), match=message):
        train(path)
    assert list(Path("models").iterdir()) == []


def test_a_failed_training_says_why_in_one_line(tiny_model_dir, capfd):
    path = write_job(tiny_model_dir, max_length=8)
    assert report_errors(lambda: train(path)) == 1
    err = capfd.readouterr().err
    assert "over 8 tokens and 0 held out; raise training.max_length" in err
    assert "Traceback" not in err and not Path(OUT).exists()


@pytest.mark.slow
def test_a_finished_checkpoint_is_replaced_only_by_a_finished_one(tiny_model_dir, monkeypatch):
    before = files_of(train(write_job(tiny_model_dir)))
    monkeypatch.setattr("distill_app.training.train._save_records", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(write_job(tiny_model_dir, learning_rate=1e-3))
    assert files_of(OUT) == before and len(list(Path("models").iterdir())) == 1


def test_a_checkpoint_that_cannot_be_loaded_takes_no_place(tiny_model_dir, monkeypatch):
    def save_half(model, tokenizer, folder):
        save_checkpoint(model, tokenizer, folder)
        weights = Path(folder, "model.safetensors")
        weights.write_bytes(weights.read_bytes()[:1000])

    monkeypatch.setattr("distill_app.training.train.save_checkpoint", save_half)
    with pytest.raises(ValueError, match="model.safetensors: unreadable weights"):
        train(write_job(tiny_model_dir))
    assert not list(Path("models").iterdir())


def test_a_model_whose_logits_are_more_than_an_output_layer_is_refused(tiny_model_dir):
    model, tokenizer = load_trainable(str(tiny_model_dir))
    (example,) = build_examples(RECORDS[:1], tokenizer, OURS).train
    check_output_layer(model, example, None)
    forward = model.forward

    def scaled(*args, **kwargs):
        found = forward(*args, **kwargs)
        found.logits = found.logits * 0.5
        return found

    model.forward = scaled
    with pytest.raises(ValueError, match="its logits are no plain output layer over its last hidden states"):
        check_output_layer(model, example, None)
