"""How the built-in trainer is started, with GPUs pretended."""

import sys
from pathlib import Path

import pytest
import yaml

from distill_app import run_easy_distill
from distill_app.core.files import save_json
from distill_app.easydistill.job import Job
from distill_app.easydistill.launch import launcher


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def with_gpus(monkeypatch, count):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)


def config(**keys):
    """Return a job with these keys."""
    paths = {
        "dataset": {"labeled_path": "d.json"},
        "models": {"student": "s"},
        "training": {"output_dir": "o"},
    }
    return Job.model_validate({"path": "job.json", "job_type": "kd_black_box_train_only", **paths, **keys})


def own_file(**changes):
    """Write an accelerate config of one's own; return its path."""
    file = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 2}
    Path("own.yaml").write_text(yaml.safe_dump({**file, **changes}))
    return "own.yaml"


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_without_accelerate_one_process_trains_whatever_the_gpus(monkeypatch, gpus):
    with_gpus(monkeypatch, gpus)
    assert launcher(config(accelerate=None)) == launcher(config()) == [sys.executable]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_as_many_processes_start_as_there_are_gpus(monkeypatch, name):
    for gpus in (2, 8):
        with_gpus(monkeypatch, gpus)
        *command, option, number = launcher(config(accelerate=name))
        assert command[1:4] == ["-m", "accelerate.commands.launch", "--config_file"]
        assert (option, number) == ("--num_processes", str(gpus))
        kind = yaml.safe_load(Path(command[4]).read_text())["distributed_type"]
        assert kind == {"ddp": "MULTI_GPU", "fsdp": "FSDP"}[name]
    with_gpus(monkeypatch, 1)
    assert launcher(config(accelerate=name)) == [sys.executable]
    with_gpus(monkeypatch, 0)
    with pytest.raises(ValueError, match=f"accelerate: {name}: found no GPU, expected one or more"):
        launcher(config(accelerate=name))


def test_a_file_of_ones_own_is_taken_as_it_is(monkeypatch):
    with_gpus(monkeypatch, 4)
    assert launcher(config(accelerate=own_file()))[-2:] == ["--config_file", "own.yaml"]
    assert launcher(config(accelerate=own_file(distributed_type="FSDP", num_processes=8, num_machines=2)))
    with_gpus(monkeypatch, 0)
    assert launcher(config(accelerate=own_file(use_cpu=True)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distributed_type": "DEEPSPEED"}, "distributed_type: found DEEPSPEED, expected MULTI_GPU or FSDP"),
        ({"distributed_type": "MEGATRON_LM"}, "distributed_type: found MEGATRON_LM"),
        ({"distributed_type": None}, "distributed_type: found None"),
        ({"deepspeed_config": {"zero_stage": 2}}, "deepspeed_config: the trainer does not run under it"),
        ({"parallelism_config": {"tp_size": 2}}, "parallelism_config: the trainer does not run under it"),
        ({"num_processes": "two"}, "num_processes: found 'two', expected a number"),
        ({"num_processes": 8}, "num_processes: found 8, more than the 2 GPUs of 1 machine;"),
    ],
)
def test_a_file_that_the_trainer_cannot_do_is_refused(monkeypatch, changes, message):
    with_gpus(monkeypatch, 2)
    with pytest.raises(ValueError, match=f"accelerate: own.yaml: {message}"):
        launcher(config(accelerate=own_file(**changes)))


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match="accelerate: none.yaml: no such file; expected ddp, fsdp or"):
        launcher(config(accelerate="none.yaml"))


@pytest.mark.parametrize(
    "job",
    [
        {"accelerate": "own.yaml"},
        {"training": {"output_dir": "models/s1", "deepspeed": "zero2.json"}},
    ],
)
def test_deepspeed_is_refused_before_anything_is_labelled_or_loaded(monkeypatch, capfd, job):
    own_file(distributed_type="DEEPSPEED")
    started = []
    monkeypatch.setattr("distill_app.easydistill.run.run_child", lambda *args: started.append(args))
    config = {
        "job_type": "kd_black_box_local",
        "dataset": {"instruction_path": "data/instructions.json", "labeled_path": "data/labeled.json"},
        "models": {"student": "models/none", "teacher": "models/none"},
        "training": {"output_dir": "models/s1"},
        "backend": "builtin",
        **job,
    }
    save_json("config.json", config)
    assert run_easy_distill("config.json") == 1
    err = capfd.readouterr().err
    assert "DeepSpeed" in err or "DEEPSPEED" in err
    assert err.count("\n") == 1 and not started
