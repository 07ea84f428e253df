"""Trainings that are killed, and go on as if they had not been."""

import json
import shutil
from pathlib import Path

import pytest
from trainings import OUT, curve, dies_at, exit_code, files_of, in_fork, train, write_job

from distill_app.training import trainer, work
from distill_app.training.work import WHOLE, last_checkpoint, whole_checkpoints, work_folder

VALIDATED = {"validation": {"fraction": 0.3}}
CHILD_LOG = "fork.log"


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """An empty folder to train in."""
    monkeypatch.chdir(tmp_path)


def kill_at(monkeypatch, path, *where, **options):
    """Train in a fork that dies as `dies_at` says."""
    with monkeypatch.context() as patch:
        dies_at(patch, *where, **options)
        assert exit_code(in_fork(lambda: train(path))) == -9
    assert not Path(OUT).exists()


def checkpoints():
    return sorted(path.name for path in work.ROOT.rglob("checkpoint-*"))


KINDS = {
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    "bfloat16, validation, cosine": {"bf16": True, "sections": VALIDATED, "lr_scheduler_type": "cosine"},
    "epochs": {"save_strategy": "epoch", "num_train_epochs": 3},
    "dropout, adapters": {"sections": {"lora": {"r": 4, "lora_dropout": 0.3}}},
    "part of an epoch": {"max_steps": 5, "sections": VALIDATED, "learning_rate": 0.2},
}


@pytest.mark.parametrize(
    "kind", ["epochs", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "epochs")]
)
def test_a_killed_training_goes_on_to_the_same_bytes(tiny_model_dir, kind, monkeypatch, capfd):
    path = write_job(
        tiny_model_dir, save_steps=2, **{"num_train_epochs": 2, "logging_steps": 1, **KINDS[kind]}
    )
    unbroken = files_of(train(path))
    shutil.rmtree("models")
    kill_at(monkeypatch, path, trainer.DistillationTrainer, "training_step", 5)
    assert checkpoints()
    capfd.readouterr()
    train(path)
    assert "training: going on from checkpoint-" in capfd.readouterr().err
    assert files_of(OUT) == unbroken
    assert not checkpoints() and not [
        path for path in work.ROOT.rglob("*") if path.is_file() and path.name != "lock"
    ]


@pytest.mark.slow
def test_a_training_killed_again_and_again_ends_as_an_unbroken_one(tiny_model_dir, monkeypatch):
    path = write_job(tiny_model_dir, save_steps=1, bf16=True, sections=VALIDATED)
    unbroken = files_of(train(path))
    shutil.rmtree("models")
    moments = [
        (trainer.DistillationTrainer, "training_step", 1),  # before there is a checkpoint
        (trainer.DistillationTrainer, "_save_checkpoint", 1),  # written, not marked whole
        (trainer.DistillationTrainer, "_save_optimizer_and_scheduler", 2),  # half-written
        (trainer.DistillationTrainer, "evaluate", 1),
        (work, "save_text", 1),  # the older ones still there
    ]
    for moment in moments:
        kill_at(monkeypatch, path, *moment)
    train(path)
    assert files_of(OUT) == unbroken


@pytest.mark.slow
@pytest.mark.parametrize(("patience", "limit"), [(None, {"max_steps": 5}), (2, {"num_train_epochs": 4})])
def test_one_killed_after_its_last_step_trains_no_further(tiny_model_dir, patience, limit, monkeypatch):
    sections = {"validation": {"fraction": 0.3, "patience": patience}}
    path = write_job(tiny_model_dir, save_steps=1, learning_rate=0.2, sections=sections, **limit)
    unbroken = files_of(train(path))
    shutil.rmtree("models")
    kill_at(monkeypatch, path, trainer.DistillationTrainer, "_load_best_model", 1, after=False)
    train(path)
    assert files_of(OUT) == unbroken


@pytest.mark.slow
def test_patience_counts_the_evaluations_before_a_kill(tiny_model_dir, monkeypatch):
    sections = {"validation": {"fraction": 0.3, "patience": 3}}
    path = write_job(tiny_model_dir, save_steps=1, learning_rate=0.2, num_train_epochs=20, sections=sections)
    unbroken = files_of(train(path))
    steps = curve(OUT)[-1][0]
    assert 3 < steps < 60
    shutil.rmtree("models")
    kill_at(monkeypatch, path, trainer.DistillationTrainer, "training_step", steps - 1)
    train(path)
    assert files_of(OUT) == unbroken


@pytest.mark.slow
def test_a_checkpoint_that_is_not_whole_is_not_used(tiny_model_dir, monkeypatch, capfd):
    path = write_job(tiny_model_dir, save_steps=2)
    unbroken = files_of(train(path))
    shutil.rmtree("models")
    kill_at(monkeypatch, path, trainer.DistillationTrainer, "training_step", 5)
    (newest,) = work.ROOT.rglob("checkpoint-4")
    later = newest.with_name("checkpoint-5")
    shutil.copytree(newest, later)
    (later / WHOLE).unlink()
    weights = later / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    capfd.readouterr()
    train(path)
    assert "going on from checkpoint-4" in capfd.readouterr().err
    assert files_of(OUT) == unbroken


@pytest.mark.slow
def test_a_training_with_other_params_starts_anew_and_the_stale_checkpoints_go(
    tiny_model_dir, monkeypatch, capfd
):
    kill_at(
        monkeypatch, write_job(tiny_model_dir, save_steps=2), trainer.DistillationTrainer, "training_step", 5
    )
    (old,) = work.ROOT.rglob("checkpoint-*")
    path = write_job(tiny_model_dir, save_steps=2, learning_rate=3e-3)
    kill_at(monkeypatch, path, trainer.DistillationTrainer, "training_step", 1)
    assert not old.parent.exists()
    capfd.readouterr()
    other = files_of(train(path))
    assert "going on" not in capfd.readouterr().err
    shutil.rmtree("models")
    assert files_of(train(path)) == other


@pytest.mark.slow
@pytest.mark.parametrize("what", ["data", "student", "template"])
def test_other_data_student_or_template_starts_anew(what, tiny_copy, monkeypatch, capfd):
    path = write_job(tiny_copy, save_steps=2)
    kill_at(monkeypatch, path, trainer.DistillationTrainer, "training_step", 5)
    if what == "data":
        data = Path("data/labeled.json")
        data.write_text(data.read_text().replace("It is 3.", "It is III."))
    elif what == "student":
        import torch

        from distill_app.core.models import load_trainable, save_checkpoint

        model, tokenizer = load_trainable(str(tiny_copy))
        with torch.no_grad():
            next(model.parameters()).mul_(2)
        save_checkpoint(model, tokenizer, tiny_copy)
    else:
        template = Path("configs/s1.jinja")
        template.write_text(template.read_text().replace("User:", "Human:"))
    capfd.readouterr()
    train(path)
    assert "going on" not in capfd.readouterr().err


@pytest.mark.slow
def test_trainings_of_two_outputs_of_one_name_leave_each_other_alone(tiny_model_dir, monkeypatch, capfd):
    path = write_job(tiny_model_dir, save_steps=2)
    kill_at(monkeypatch, path, trainer.DistillationTrainer, "training_step", 5)
    other = write_job(tiny_model_dir, name="other")
    config = json.loads(Path(other).read_text())
    config["training"]["output_dir"] = "elsewhere/s1"
    Path(other).write_text(json.dumps(config))
    train(other)
    assert checkpoints() == ["checkpoint-4"]
    capfd.readouterr()
    train(path)
    assert "going on from checkpoint-4" in capfd.readouterr().err


def test_two_trainings_for_one_output_at_once_are_refused():
    with (
        work_folder("models/s1", {"seed": 1}) as folder,
        pytest.raises(ValueError, match=r"models/s1: another process is training for it; wait for that one"),
    ):
        (folder / "checkpoint-3").mkdir()
        try:
            with work_folder("models/s1", {"seed": 2}):
                pass
        finally:
            assert (folder / "checkpoint-3").is_dir()


def test_a_second_training_at_once_says_so_in_one_line_and_the_first_goes_on(tiny_model_dir):
    from distill_app.core.stage import report_errors

    path = write_job(tiny_model_dir)
    with work_folder("models/s1", {}):
        assert exit_code(in_fork(lambda: report_errors(lambda: train(path)) == 1 or 1 / 0)) == 0
        lines = Path(CHILD_LOG).read_text().splitlines()
        assert [line for line in lines if "error" in line] == [
            "error: models/s1: another process is training for it; wait for that one, or stop it"
        ]
    assert train(path) == OUT


def test_the_output_appears_only_at_the_end(tiny_model_dir, monkeypatch):
    seen = []
    real = trainer.DistillationTrainer.training_step

    def watching(*args, **kwargs):
        seen.append(Path(OUT).exists() or [p for p in Path().glob("models/*") if not p.name.startswith(".")])
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer.DistillationTrainer, "training_step", watching)
    train(write_job(tiny_model_dir))
    assert seen == [[]] * 6 and Path(OUT).exists()


@pytest.mark.slow
def test_only_the_newest_checkpoint_and_the_best_are_kept(tiny_model_dir, monkeypatch):
    path = write_job(tiny_model_dir, save_steps=1, learning_rate=0.05, num_train_epochs=6, sections=VALIDATED)
    train(path)
    best = json.loads(Path(OUT, "metrics.json").read_text())["best_step"]
    steps = curve(OUT)[-1][0]
    assert best < steps - 1
    shutil.rmtree("models")
    kill_at(monkeypatch, path, trainer.DistillationTrainer, "_load_best_model", 1, after=False)
    assert checkpoints() == sorted([f"checkpoint-{best}", f"checkpoint-{steps}"])


def test_checkpoints_are_ordered_by_step_and_not_by_name(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 100:
            (tmp_path / f"checkpoint-{step}" / WHOLE).touch()
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
