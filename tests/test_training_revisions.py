"""Students and teachers of the Hub are taken at one commit, which the checkpoint tells."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from test_easydistill_run import install, project  # noqa: F401  fixtures
from trainings import OUT, RECORDS, train, write_job

from distill_app import run_easy_distill
from distill_app.core.models import hub_commit, load_trainable
from distill_app.easydistill.job import at_commit
from distill_app.generation.identity import resolve_weights
from distill_app.labeling import job as labeling
from distill_app.report.cards.origin import front_matter
from distill_app.training import adapters
from distill_app.training import train as training
from distill_app.training.config import read_training
from distill_app.training.provenance import origin_of

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two checkpoints with weights of their own, by commit."""
    folder = tmp_path_factory.mktemp("commits")
    return {commit: make_tiny_model(folder / commit, seed=seed) for seed, commit in enumerate((OLD, NEW))}


@pytest.fixture
def hub(tmp_path, monkeypatch, checkpoints):
    """The Hub's cache with some/student in it, of which v1 is the old commit and main the new one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub" / "models--some--student"
    for commit, folder in checkpoints.items():
        shutil.copytree(folder, model / "snapshots" / commit)
        (model / "snapshots" / commit / "README.md").write_text("---\nlicense: mit\n---\n")
    (model / "refs").mkdir()
    (model / "refs" / "v1").write_text(OLD)
    (model / "refs" / "main").write_text(NEW)
    return model


def first_weights(folder):
    return load_trainable(str(folder))[0].model.embed_tokens.weight


def write(revision=None, **sections):
    models = {"student_revision": revision} if revision else {}
    return write_job("some/student", sections={"models": models, **sections}, learning_rate=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("revision", "commit"), [(None, NEW), ("v1", OLD), (OLD, OLD)])
def test_a_student_is_trained_from_the_commit_that_its_revision_is(hub, checkpoints, revision, commit):
    train(write(revision))
    assert torch.equal(first_weights(OUT), first_weights(checkpoints[commit]))
    student = json.loads(Path(OUT, "provenance.json").read_text())["student"]
    assert (student["model"], student["commit"], student["license"]) == ("some/student", commit, "mit")
    assert f"commit `{commit}`" in Path(OUT, "README.md").read_text()
    assert front_matter(Path(OUT, "README.md"))["base_model"] == "some/student"


@pytest.mark.slow
def test_weights_under_adapters_are_those_of_the_commit(hub, checkpoints):
    train(write("v1", lora={"r": 2}))
    assert torch.equal(first_weights(OUT), first_weights(checkpoints[OLD]))


@pytest.mark.slow
def test_the_tokenizer_is_the_commits(hub, monkeypatch):
    seen = []
    real = training.load_tokenizer
    monkeypatch.setattr(
        training, "load_tokenizer", lambda name, revision: seen.append(revision) or real(name, revision)
    )
    train(write("v1"))
    assert seen == [OLD]


def test_a_branch_that_moves_is_another_training(hub):
    """Or a killed one would go on with other weights."""
    path = write()
    before = origin_of(at_commit(read_training(path)), None, 1)
    assert before == origin_of(at_commit(read_training(path)), None, 1)
    (hub / "refs" / "main").write_text(OLD)
    after = origin_of(at_commit(read_training(path)), None, 1)
    assert (before["student"]["commit"], after["student"]["commit"]) == (NEW, OLD)


def test_a_revision_that_is_not_there_is_told(hub):
    with pytest.raises(
        OSError, match=r"some/student: v9 is not in the local cache .*; fix the name or the revision"
    ) as caught:
        train(write("v9"))
    assert "\n" not in str(caught.value)
    assert hub_commit(str(hub / "snapshots" / OLD)) is None


@pytest.mark.slow
def test_a_teachers_commit_is_told_as_the_config_names_it(hub, checkpoints):
    models = {"teacher": "some/student", "teacher_revision": "v1"}
    train(write_job(checkpoints[NEW], sections={"models": models}))
    teacher = json.loads(Path(OUT, "provenance.json").read_text())["teacher"]
    assert (teacher["revision"], teacher["commit"]) == ("v1", OLD)
    assert f"commit `{OLD}`" in Path(OUT, "README.md").read_text()


@pytest.mark.slow
def test_a_revision_whose_commit_is_not_known_is_called_no_commit(hub, checkpoints):
    models = {"teacher": "big/teacher", "teacher_revision": "v1"}
    train(write_job(checkpoints[NEW], sections={"models": models}))
    teacher = json.loads(Path(OUT, "provenance.json").read_text())["teacher"]
    assert teacher["revision"] == "v1" and "commit" not in teacher
    assert "| revision `v1` |" in Path(OUT, "README.md").read_text()


def test_a_job_labels_with_the_teacher_at_its_revision(hub, checkpoints):
    config = {
        "job_type": "kd_black_box_local",
        "dataset": {"labeled_path": "labeled.json"},
        "inference": {"max_new_tokens": 4},
        "models": {"teacher": "some/student", "teacher_revision": "v1", "student": "some/student"},
        "training": {"output_dir": OUT},
    }
    Path("job.json").write_text(json.dumps(config))
    job = labeling.read_label_job("job.json")
    assert labeling._params(job).revision == "v1"
    engine = labeling._open(job)
    assert engine.identity["weights"] == resolve_weights(str(checkpoints[OLD]), None)[0]
    assert engine.identity["weights"] != resolve_weights(str(checkpoints[NEW]), None)[0]


def test_the_real_easydistill_gets_the_commits_snapshot(hub, install, tmp_path, checkpoints):  # noqa: F811
    install(gpus=0)
    Path("labeled.json").write_text(json.dumps(RECORDS))
    path = write("v1")
    assert run_easy_distill(path, backend="easydistill") == 0
    assert torch.equal(first_weights(OUT), first_weights(checkpoints[OLD]))
    assert f"commit `{OLD}`" in Path(OUT, "README.md").read_text()


@pytest.mark.slow
def test_adapters_are_merged_into_the_weights_they_were_trained_on(hub, monkeypatch):
    seen = []
    real = adapters.load_trainable

    def noted(*args, **options):
        seen.append(options.get("revision", args[3] if len(args) > 3 else None))
        return real(*args, **options)

    monkeypatch.setattr(adapters, "load_trainable", noted)
    train(write("v1", lora={"r": 2}))
    assert seen == [OLD, OLD]
