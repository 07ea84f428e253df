"""Two and four processes on one CPU learn what one does."""

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from trainings import (
    OUT,
    RECORDS,
    curve,
    dies_at,
    exit_code,
    files_of,
    in_fork,
    train,
    write_job,
    write_teacher,
)

from distill_app import run_easy_distill
from distill_app.core.models import check_checkpoint, load_tokenizer, load_trainable
from distill_app.training import work
from distill_app.training.trainer import DistillationTrainer

# Of the type MULTI_CPU accelerate starts one process alone, unless it is given mpirun
TWO_PROCESSES = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
mixed_precision: "no"
num_machines: 1
main_process_port: 0
num_processes: 2
use_cpu: true
"""
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
VALIDATED = {"validation": {"fraction": 0.3}}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """An empty folder to train in."""
    monkeypatch.chdir(tmp_path)


def together(call, processes=2, **environment):
    """Run a call in forks as accelerate would start it; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true",
        "FORK_LAUNCHED": "1",
        **environment,
    }

    def ranked():
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)  # this process may have trained before the fork
        if environment.get("ACCELERATE_USE_FSDP"):
            AcceleratorState.__init__ = sharding_on_a_cpu(AcceleratorState.__init__)
        call()

    pids = [
        in_fork(ranked, f"rank{rank}.log", RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(processes)
    ]
    return [exit_code(pid) for pid in pids]


def sharding_on_a_cpu(init):
    """accelerate shards weights on GPUs alone, though torch shards them on a CPU too."""

    def with_plugin(self, *args, fsdp_plugin=None, **kwargs):
        from accelerate.utils import DistributedType

        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.distributed_type = DistributedType.FSDP
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin

    return with_plugin


def train_together(path, processes=2, **environment):
    codes = together(lambda: train(path), processes, **environment)
    logs = [Path(f"rank{rank}.log").read_text() for rank in range(processes)]
    assert codes == [0] * processes, "".join(logs)


def job(student, each, **options):
    """A config whose step takes `each` examples a process."""
    return write_job(student, per_device_train_batch_size=each, logging_steps=1, **options)


def assert_same(student, alone, both, processes=2, **environment):
    """Train alone and together; loss curves, and weights as far as bfloat16 shows, must be the same."""
    train(alone())
    one, first = curve(OUT), load_trainable(OUT)[0].state_dict()
    train_together(both(), processes, **environment)
    two, second = curve(OUT), load_trainable(OUT)[0].state_dict()
    assert [step for step, _ in one] == [step for step, _ in two]
    assert np.allclose([loss for _, loss in one], [loss for _, loss in two], atol=2e-4)
    assert one[-1][1] < one[0][1]
    for name, weight in first.items():
        assert torch.allclose(weight, second[name], atol=1e-3, rtol=2**-7), name


SMALL = {"learning_rate": 2e-3}


@pytest.mark.parametrize("environment", [{}, pytest.param(FSDP, marks=pytest.mark.slow)], ids=["ddp", "fsdp"])
def test_two_processes_learn_what_one_does_with_their_batches_together(tiny_model_dir, environment):
    """Their examples of a step go through in several parts, those of the one in one."""
    assert_same(
        tiny_model_dir,
        lambda: job(tiny_model_dir, 4, max_length=50, **SMALL),
        lambda: job(tiny_model_dir, 1, gradient_accumulation_steps=2, max_length=50, **SMALL),
        **environment,
    )
    assert json.loads(Path(OUT, "provenance.json").read_text())["examples"]["train"] == len(RECORDS)


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("processes", [2, 4])
def test_a_last_step_that_is_not_full_weighs_each_token_the_same(tiny_model_dir, processes, environment):
    """Of 13 examples in steps of 4 or 12 the last has one: most processes are left without an example."""
    records = [*RECORDS, {**RECORDS[0], "output": "It is the last. " * 9}]
    options = {"records": records, "max_length": 200, **SMALL}
    each = {2: 2, 4: 3}[processes]
    assert_same(
        tiny_model_dir,
        lambda: job(tiny_model_dir, each * processes, **options),
        lambda: job(tiny_model_dir, each, **options),
        processes,
        **environment,
    )


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP], ids=["ddp", "fsdp"])
def test_processes_share_a_step_of_so_many_tokens(tiny_model_dir, environment):
    sections = {"batching": {"tokens_per_step": 90, "tokens_at_a_time": 40}}
    options = {"sections": sections, **SMALL}
    assert_same(
        tiny_model_dir,
        lambda: job(tiny_model_dir, 1, **options),
        lambda: job(tiny_model_dir, 1, **options),
        **environment,
    )


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP], ids=["ddp", "fsdp"])
def test_they_evaluate_an_odd_number_of_examples_as_one_does(tiny_model_dir, environment):
    """In as many parts on each, though one has an example more than the other."""
    records = [
        {"instruction": f"Name number {n}.", "input": "", "output": f"It is {n}. " * 4} for n in range(35)
    ]
    options = {"records": records, "sections": VALIDATED, "max_steps": 2, "max_length": 64, **SMALL}
    train(job(tiny_model_dir, 2, **options))
    points = curve(OUT, "validation")
    held_out = json.loads(Path(OUT, "provenance.json").read_text())["examples"]["validation"]
    assert held_out % 2 == 1
    train_together(job(tiny_model_dir, 1, **options), **environment)
    assert np.allclose(points, curve(OUT, "validation"), atol=2e-4)


@pytest.mark.slow
def test_two_processes_learn_from_a_teacher_as_one_does(tiny_model_dir):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    make = np.random.default_rng(0)

    def distribution(row, example):
        count = sum(label != -100 for label in example.labels)
        logits = make.normal(size=(count, len(tokenizer))) * 3
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    write_teacher("logits.arrow", tokenizer, RECORDS, distribution)
    sections = {"job_type": "kd_white_box_train_only", "dataset": {"logits_path": "logits.arrow"}}
    assert_same(
        tiny_model_dir,
        lambda: job(tiny_model_dir, 4, sections=sections, **SMALL),
        lambda: job(tiny_model_dir, 2, sections=sections, **SMALL),
    )


@pytest.mark.slow
def test_accelerate_launches_them_from_the_config_and_one_checkpoint_comes_out(tiny_model_dir):
    Path("two.yaml").write_text(TWO_PROCESSES)
    sections = {**VALIDATED, "accelerate": "two.yaml"}
    assert run_easy_distill(job(tiny_model_dir, 2, sections=sections, save_steps=2)) == 0
    check_checkpoint(OUT)
    assert [path.name for path in Path("models").iterdir()] == ["s1"]
    assert json.loads(Path(OUT, "provenance.json").read_text())["processes"] == 2
    assert not list(work.ROOT.rglob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_that_were_killed_go_on_to_the_same_bytes(tiny_model_dir, environment, monkeypatch):
    lora = {} if environment else {"lora": {"r": 4, "lora_dropout": 0.3}}
    path = job(tiny_model_dir, 2, save_steps=2, max_steps=4, bf16=True, sections={**VALIDATED, **lora})
    train_together(path, **environment)
    unbroken = files_of(OUT)
    shutil.rmtree("models")
    with monkeypatch.context() as patch:
        dies_at(patch, DistillationTrainer, "training_step", 4, after=False)
        assert together(lambda: train(path), **environment) == [-9, -9]
    assert not Path(OUT).exists() and list(work.ROOT.rglob("whole"))
    train_together(path, **environment)
    assert "going on from checkpoint-2" in Path("rank0.log").read_text()
    assert files_of(OUT) == unbroken


@pytest.mark.slow
def test_sharded_weights_are_really_sharded(tiny_model_dir, monkeypatch):
    real = DistillationTrainer.training_step

    def checked(self, *args, **kwargs):
        assert self.is_fsdp_enabled and all(
            len(p.to_local()) * 2 == len(p) or len(p) % 2 for p in self.model_wrapped.parameters()
        )
        return real(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "training_step", checked)
    train_together(job(tiny_model_dir, 2, max_steps=1), **FSDP)
