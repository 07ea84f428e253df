"""How the built-in trainer is started: by this Python, or by accelerate in a process for each GPU."""

import sys
from pathlib import Path
from typing import Any

from distill_app.core.params import read_params
from distill_app.easydistill.job import Job

OURS = ("ddp", "fsdp")
KINDS = ("MULTI_GPU", "FSDP", "NO")  # accelerate's distributed_type, those that the trainer is tested under
OTHER_ENGINES = ("deepspeed_config", "megatron_lm_config", "parallelism_config")


def launcher(job: Job) -> list[str]:
    """Return the command that starts a module, such as `python -m accelerate.commands.launch ...`.

    Args:
        job: its `accelerate` is "ddp", "fsdp", the path of an accelerate config, or absent.

    Raises:
        ValueError, FileNotFoundError: no GPU for it, or a file that asks for what the trainer cannot do.
    """
    if job.training.get("deepspeed"):
        raise ValueError("training.deepspeed: the trainer does not run under DeepSpeed; use accelerate: fsdp")
    name = job.accelerate
    if not name:
        return [sys.executable]
    gpus = _gpus()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    if name not in OURS:
        _check_file(name, gpus)
        return [*command, str(name)]
    if not gpus:
        raise ValueError(
            f"accelerate: {name}: found no GPU, expected one or more; remove it to train on a CPU"
        )
    if gpus == 1:
        return [sys.executable]  # nothing to share
    own = Path(__file__).with_name("accelerate") / f"{name}.yaml"
    return [*command, str(own), "--num_processes", str(gpus)]


def _check_file(path: Any, gpus: int) -> None:
    if not isinstance(path, str) or not Path(path).is_file():
        raise FileNotFoundError(
            f"accelerate: {path}: no such file; expected ddp, fsdp or an accelerate config's path"
        )
    found = read_params(path)
    where = f"accelerate: {path}"
    kind = found.get("distributed_type")
    if kind not in KINDS:
        raise ValueError(
            f"{where}: distributed_type: found {kind}, expected {' or '.join(KINDS)}; the trainer cuts a step"
            " into parts, each of which DeepSpeed and others would take for a step: use accelerate: fsdp"
        )
    for key in OTHER_ENGINES:
        if found.get(key):
            raise ValueError(f"{where}: {key}: the trainer does not run under it; remove it")
    processes, machines = found.get("num_processes"), found.get("num_machines", 1)
    if not isinstance(processes, int) or processes < 1:
        raise ValueError(f"{where}: num_processes: found {processes!r}, expected a number of processes")
    if not found.get("use_cpu") and processes > gpus * machines:
        raise ValueError(
            f"{where}: num_processes: found {processes}, more than the {gpus * machines} GPUs of"
            f" {machines} machine{'s' * (machines > 1)}; lower it, or use ddp or fsdp, which count them"
        )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
