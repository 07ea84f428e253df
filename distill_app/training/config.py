"""Reading a training config and turning its `training` section into TRL's SFTConfig."""

import dataclasses
import os
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from distill_app.core.files import read_json

JOB_TYPES = ("kd_black_box_local", "kd_black_box_train_only")
NEEDED = (("dataset", "labeled_path"), ("models", "student"), ("training", "output_dir"))


@dataclass(frozen=True)
class Job:
    """A training config, checked for what every job needs."""

    path: str
    job_type: str
    dataset: dict[str, Any]
    models: dict[str, str]
    training: dict[str, Any]

    @property
    def output_dir(self) -> str:
        """Where the finished checkpoint goes."""
        return str(self.training["output_dir"])


def read_job(path: str | os.PathLike[str]) -> Job:
    """Return the config as a job.

    Raises:
        FileNotFoundError, ValueError: the file is missing, malformed, or lacks a key; the key is named.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: found {type(config).__name__}, expected an object")
    job_type = config.get("job_type")
    if job_type not in JOB_TYPES:
        raise ValueError(f"{path}: job_type: found {job_type!r}, expected one of {', '.join(JOB_TYPES)}")
    for section, key in NEEDED:
        if not isinstance(config.get(section), dict) or not config[section].get(key):
            raise ValueError(f"{path}: {section}.{key}: missing; add it")
    sections = {name: config.get(name, {}) for name in ("dataset", "models", "training")}
    return Job(path=str(path), job_type=job_type, **sections)


def sft_arguments(job: Job, scratch_dir: str) -> Any:
    """Return TRL's SFTConfig for the job: the config's keys over defaults that suit this machine.

    Raises:
        ValueError: an unknown key (the nearest valid one is named) or a value that TRL refuses.
    """
    import torch
    from trl import SFTConfig

    has_gpu = torch.cuda.is_available()
    valid = {field.name for field in dataclasses.fields(SFTConfig)}
    options: dict[str, Any] = {
        "bf16": torch.cuda.is_bf16_supported() if has_gpu else _cpu_multiplies_bf16(),
        "use_cpu": not has_gpu,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job.dataset.get("seed", 42),
        "data_seed": job.dataset.get("seed", 42),
        "logging_first_step": True,  # a curve even where there are fewer steps than logging_steps
        "pad_to_multiple_of": 8,  # few shapes, so that kernels are made once and not for every length
        "train_sampling_strategy": "group_by_length",  # batches of like length need little padding
        "dataloader_pin_memory": has_gpu,
        **_in_current_names(job, valid),
        "output_dir": scratch_dir,
        "max_length": None,  # over-long examples are dropped and counted before they get here
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    try:
        return SFTConfig(**options)
    except (TypeError, ValueError) as err:
        raise ValueError(f"{job.path}: training: {err}") from err


def _in_current_names(job: Job, valid: set[str]) -> dict[str, Any]:
    """Return `training` with the names that transformers 5 dropped replaced by today's."""
    options = dict(job.training)
    if "warmup_ratio" in options:
        options["warmup_steps"] = options.get("warmup_steps") or options.pop("warmup_ratio")
        options.pop("warmup_ratio", None)
    if "group_by_length" in options:
        grouped = options.pop("group_by_length")
        options["train_sampling_strategy"] = "group_by_length" if grouped else "random"
    for key in options:
        if key not in valid:
            near = get_close_matches(key, [*valid, "warmup_ratio", "group_by_length"], n=1)
            hint = f"did you mean {near[0]}?" if near else "remove it"
            raise ValueError(f"{job.path}: training.{key}: unknown to SFTConfig; {hint}")
    return options


def _cpu_multiplies_bf16() -> bool:
    """Tell whether the CPU has bfloat16 matrix products; without them autocast is slower than float32."""
    import torch

    flags = torch.cpu.get_capabilities()
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("amx_tile"))
