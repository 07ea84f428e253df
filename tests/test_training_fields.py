"""Fields of SFTConfig, each with the effect that it is there for."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainings import OUT, RECORDS, curve, dies_at, exit_code, files_of, in_fork, train, write_job
from transformers.models.llama.modeling_llama import LlamaMLP

from distill_app.core.models import load_trainable
from distill_app.training import noise, trainer
from distill_app.training.config import read_training, sft_arguments

VALIDATED = {"validation": {"fraction": 0.3}}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """An empty folder to train in."""
    monkeypatch.chdir(tmp_path)


def weights(student, **training):
    """Return the weights that a training leaves, as one row."""
    train(write_job(student, **{"num_train_epochs": 1, **training}))
    return torch.cat([p.detach().flatten() for p in load_trainable(OUT)[0].parameters()])


@pytest.fixture(scope="module")
def plain(tiny_model_dir, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("plain"))
        return weights(tiny_model_dir)


@pytest.mark.parametrize(
    "fields",
    [
        {"optim": "sgd"},
        {"optim": "adafactor"},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.5},
        {"adam_epsilon": 0.1},
        {"max_grad_norm": 0.01, "optim": "sgd"},
        {"neftune_noise_alpha": 50.0},
        {"label_smoothing_factor": 0.5},
        {"loss_type": "dft"},
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
        {"warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup"},
        {"max_steps": 1},
        {"data_seed": 7},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 5},
    ],
    ids=lambda fields: next(iter(fields)) + "=" + str(next(iter(fields.values()))),
)
def test_a_field_changes_what_is_learned(tiny_model_dir, plain, fields):
    assert not torch.equal(weights(tiny_model_dir, **fields), plain)


@pytest.mark.parametrize(
    "fields",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"activation_checkpointing": True},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4},
    ],
    ids=str,
)
def test_a_field_that_saves_memory_or_time_changes_nothing_that_is_learned(tiny_model_dir, plain, fields):
    assert torch.equal(weights(tiny_model_dir, **fields), plain)


def passes(monkeypatch, student, **training):
    """Return how often a part of a layer runs forth in a training of one step."""
    count = []
    real = LlamaMLP.forward

    def counted(self, *args, **kwargs):
        count.append(self)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", counted)
        weights(student, max_steps=1, **training)
    return len(count)


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, {"lora": {"r": 2}}], ids=["whole", "adapters"])
def test_checkpointed_layers_run_forth_once_more(tiny_model_dir, monkeypatch, sections):
    once = passes(monkeypatch, tiny_model_dir, sections=sections)
    twice = passes(monkeypatch, tiny_model_dir, sections=sections, gradient_checkpointing=True)
    assert twice == once + 4  # the tiny model's layers


def test_gradients_are_clipped_to_the_norm_that_the_config_says(tiny_model_dir, monkeypatch):
    seen = []
    real = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda p, most, **k: seen.append(most) or real(p, most, **k)
    )
    weights(tiny_model_dir, max_steps=1, max_grad_norm=0.25)
    assert seen == [0.25]


def test_noise_is_of_each_examples_own_length():
    """Whatever it is packed with: alpha / sqrt(length * width) at most, and near to that."""
    lengths = [400, 25, 1]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(3, 64)

        def forward(self, ids, position_ids):
            return self.embed(ids)

    decoder = Decoder()
    model = type(
        "Model", (), {"get_decoder": lambda s: decoder, "get_input_embeddings": lambda s: decoder.embed}
    )()
    ids = torch.zeros_like(positions)
    plain = decoder(ids, position_ids=positions)
    noise.add_noise(model, 5.0)
    moved = (decoder(ids, position_ids=positions) - plain)[0].split(lengths)
    for length, part in zip(lengths, moved, strict=True):
        most = 5.0 / (length * 64) ** 0.5
        assert 0.8 * most < part.abs().max() <= most
    decoder.eval()
    assert torch.equal(decoder(ids, position_ids=positions), plain)


def test_held_out_examples_are_scored_before_the_first_step_too(tiny_model_dir, capfd):
    train(write_job(tiny_model_dir, sections=VALIDATED, eval_on_start=True, num_train_epochs=1))
    points = curve(OUT, "validation")
    assert points[0][0] == 0 and len(points) == 2
    assert "training: step 0 of 3, held-out loss" in capfd.readouterr().err


def test_a_report_needs_no_more_than_its_name(tiny_model_dir):
    job = read_training(write_job(tiny_model_dir, report_to="dvclive"))
    assert sft_arguments(job, "w").report_to == []  # it is this trainer's own callback that writes


@pytest.mark.slow
def test_dvc_shows_a_training_that_runs_and_nothing_is_left_of_it(tiny_model_dir, monkeypatch, plain):
    start = "git -c user.name=t -c user.email=t@t commit -qm start"
    for command in ("git init -q", f"{sys.executable} -m dvc init -q", start):
        subprocess.run(command.split(), check=True)
    before = sorted(path.name for path in Path().iterdir())
    path = write_job(
        tiny_model_dir, report_to="dvclive", num_train_epochs=3, sections=VALIDATED, save_steps=2
    )
    with monkeypatch.context() as patch:
        dies_at(patch, trainer.DistillationTrainer, "training_step", 5)
        assert exit_code(in_fork(lambda: train(path))) == -9
    shown = json.loads(
        subprocess.run(
            [sys.executable, "-m", "dvc", "metrics", "show", "--json"], check=True, capture_output=True
        ).stdout
    )
    (figures,) = [f["data"] for name, f in shown[""]["data"].items() if name.startswith("live")]
    assert figures["step"] == 4 and figures["loss"] > 0 and figures["eval_loss"] > 0
    lines = Path("live/s1/plots/metrics/loss.tsv").read_text().split("\n")
    assert [line.split("\t")[0] for line in lines[:5]] == ["step", "1", "2", "3", "4"]
    train(path)
    assert not Path("live").exists() or not list(Path("live").iterdir())
    assert {p.name for p in Path().iterdir()} - {*before} <= {
        "data",
        "configs",
        "models",
        "work",
        "live",
        "fork.log",
    }
    reported = files_of(OUT)
    shutil.rmtree("models")
    train(write_job(tiny_model_dir, num_train_epochs=3, sections=VALIDATED, save_steps=2))
    assert files_of(OUT)["model.safetensors"] == reported["model.safetensors"]


def test_records_are_enough_for_what_is_tested_here():
    assert len(RECORDS) == 12  # three steps of four
