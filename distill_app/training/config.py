"""TRL's SFTConfig and what else a training needs to know, out of EasyDistill's config."""

import dataclasses
import math
import os
from typing import TYPE_CHECKING, Any

from distill_app.core.models import cpu_multiplies_bf16, quiet_libraries
from distill_app.core.params import unknown_key
from distill_app.easydistill.job import Job, read_job
from distill_app.training.fields import check_fields, is_field, sft_defaults

if TYPE_CHECKING:
    from distill_app.core.logits import TopLogits
    from distill_app.training.losses import Objective

CHECKPOINTING = ("gradient_checkpointing", "gradient_checkpointing_kwargs")  # as EasyDistill has them
DVCLIVE = "dvclive"
EVALUATION_OFF = {"eval_strategy": "no", "eval_steps": None, "eval_delay": 0, "eval_on_start": False}
SPLIT_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def read_training(
    path: str | os.PathLike[str], labeled_path: str | None = None, logits_path: str | None = None
) -> Job:
    """Return the config as a job that can be trained, with other data than it names if that is given.

    Raises:
        FileNotFoundError, ValueError: the file is missing, malformed, or a key is missing, unknown, of a
            value that has no meaning or against another key; the key is named.
    """
    job = read_job(path, labeled_path, logits_path)
    _refuse_contradictions(job)
    return job


def _refuse_contradictions(job: Job) -> None:
    if job.models.quantization != "none" and not job.lora:
        raise ValueError(
            f"{job.path}: models.quantization: found {job.models.quantization} without lora; quantized"
            " weights cannot be trained themselves, add a lora section"
        )
    if not job.is_white_box:
        return
    if job.job_type == "kd_white_box_train_only" and not job.dataset.logits_path:
        raise ValueError(f"{job.path}: dataset.logits_path: missing; add the teacher's probabilities' file")
    if job.training.get("completion_only_loss") is False:
        raise ValueError(
            f"{job.path}: training.completion_only_loss: found false in a white-box job, expected true: the"
            " teacher's probabilities are of answers only"
        )


def objective_of(job: Job, logits: "TopLogits | None", softcap: float | None) -> "Objective":
    """Return what the job minimises."""
    from distill_app.training.losses import Objective

    return Objective(
        kd_ratio=0.0 if logits is None else job.distillation.kd_ratio,
        divergence=job.distillation.distillation_type,
        temperature=job.distillation.temperature,
        vocab_size=None if logits is None else logits.vocab_size,
        label_smoothing=job.training.get("label_smoothing_factor", 0.0),
        by_confidence=job.training.get("loss_type", "nll") == "dft",
        softcap=softcap,
    )


def check_training(path: str | os.PathLike[str]) -> None:
    """Make sure that a config can be trained, as far as it says without data, models and other machines.

    Raises:
        FileNotFoundError, ValueError: it cannot; one line.
    """
    quiet_libraries()
    job = read_job(path)
    if job.backend == "easydistill":  # its own, older TRL will say the rest
        for key in job.training:
            if not is_field(key):
                raise ValueError(f"{path}: training.{key}: {unknown_key(key, sft_defaults())}")
        return
    _refuse_contradictions(job)
    _refuse_unknown_adapters(job)
    sft_arguments(job, job.output_dir, has_validation=job.validation.fraction > 0)


def _refuse_unknown_adapters(job: Job) -> None:
    from peft import LoraConfig

    known = [field.name for field in dataclasses.fields(LoraConfig)]
    for key in job.lora or {}:
        if key not in known:
            raise ValueError(f"{job.path}: lora.{key}: {unknown_key(key, known)}")


def sft_arguments(job: Job, work_dir: str, has_validation: bool = False) -> Any:
    """Return TRL's SFTConfig for the job: the config's keys over defaults that suit this machine.

    Raises:
        ValueError: a key that is unknown, idle or too old (what to do is said), or a value that TRL refuses.
    """
    import torch
    from trl import SFTConfig

    check_fields(job.training, f"{job.path}: training")
    fields = dict(job.training)
    if not has_validation:
        if not job.validation.fraction:
            _refuse_evaluation(job)
        fields = {key: value for key, value in fields.items() if key not in EVALUATION_OFF}
    has_gpu = torch.cuda.is_available()
    can_bf16 = torch.cuda.is_bf16_supported() if has_gpu else cpu_multiplies_bf16()
    if "warmup_ratio" in fields:  # transformers 5 takes a share of the steps in place of their number
        ratio = fields.pop("warmup_ratio")
        fields["warmup_steps"] = fields.get("warmup_steps") or ratio
    options: dict[str, Any] = {
        "bf16": can_bf16 and not fields.get("fp16"),
        "use_cpu": not has_gpu,
        "disable_tqdm": True,
        "seed": job.dataset.seed,
        "data_seed": job.dataset.seed,
        "save_steps": 1000,
        "dataloader_pin_memory": has_gpu,
        "ddp_find_unused_parameters": False,
        **_renamed(fields),
        "report_to": [name for name in reporters(job) if name != DVCLIVE] or "none",
    }
    # One batch a step, which the trainer cuts into parts by tokens: the Trainer need not accumulate
    merged = options.get("per_device_train_batch_size", 8) * options.pop("gradient_accumulation_steps", 1)
    options |= {
        "per_device_train_batch_size": merged,
        "gradient_accumulation_steps": 1,
        "output_dir": work_dir,
        "max_length": None,
        "logging_steps": 1,  # the curve is thinned when it is written, so that a resumed one is the same
        "logging_strategy": "steps",
        "remove_unused_columns": False,
        "label_smoothing_factor": 0.0,  # the loss does it
        "neftune_noise_alpha": None,  # `noise.add_noise` does it
        "save_total_limit": None,  # old checkpoints go when a newer one is whole
        "average_tokens_across_devices": True,
        "packing": False,
        "padding_free": False,
    }
    if has_validation:
        options |= _evaluation(options)
    try:
        return SFTConfig(**options)
    except (TypeError, ValueError) as err:
        raise ValueError(f"{job.path}: training: {' '.join(str(err).split())}") from err


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields of a training in transformers 5's names of them; off is said, for TRL's default is on."""
    names = {name: name.replace("gradient", "activation") for name in fields if name in CHECKPOINTING}
    return {"activation_checkpointing": False, **{names.get(k, k): value for k, value in fields.items()}}


def _evaluation(options: dict[str, Any]) -> dict[str, Any]:
    """Return when held-out examples are scored and a checkpoint is written: both at the same steps."""
    strategy = options.get("eval_strategy") or options.get("save_strategy", "steps")
    if strategy == "no":
        strategy = "steps"
    steps = options.get("eval_steps") or options["save_steps"]
    return {
        "eval_strategy": strategy,
        "save_strategy": strategy,
        "eval_steps": steps,
        "save_steps": steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    }


def _refuse_evaluation(job: Job) -> None:
    """Raise ValueError for a field that speaks of held-out examples where there are none."""
    for key, off in EVALUATION_OFF.items():
        if job.training.get(key) not in (None, off):
            raise ValueError(
                f"{job.path}: training.{key}: found {job.training[key]!r} where no example is held out; set"
                " validation.fraction, or remove it"
            )


def reporters(job: Job) -> list[str]:
    """Return what a training's figures are sent to while it runs, in transformers' names.

    Raises:
        ValueError: one is unknown or not installed.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    asked = job.training.get("report_to") or "none"
    names = [asked] if isinstance(asked, str) else list(asked)
    if names == ["none"]:
        return []
    installed = get_available_reporting_integrations()
    for name in names:
        if name != "all" and name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"{job.path}: training.report_to: found {name!r}, expected none, all or one of"
                f" {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            )
        if name != "all" and name not in installed:
            raise ValueError(f"{job.path}: training.report_to: {name} is not installed; pip install {name}")
    return installed if names == ["all"] else names


def max_length(job: Job) -> int | None:
    """Return the most tokens of prompt and response, None for no limit; not given, it is SFTConfig's."""
    default = job.distillation.max_seq_length or sft_defaults()["max_length"]
    limit: int | None = job.training.get("max_length", default)
    return limit


def logging_steps(job: Job) -> int:
    """Return over how many steps a point of the written loss curve is averaged."""
    found = job.training.get("logging_steps", 10)
    return max(1, math.floor(found)) if found >= 1 else 1


def token_budget(job: Job) -> int:
    """Return how many tokens go through the model at a time: the most that a batch of the config may have."""
    return int(job.training.get("per_device_train_batch_size", 8)) * (max_length(job) or 512)


def splits_weights(job: Job, arguments: Any) -> bool:
    """Tell whether the student trains in bfloat16 with its float32 rests in the optimizer.

    Other optimizers, adapters and sharded weights train in float32 under autocast.
    """
    plain = arguments.optim in SPLIT_OPTIMIZERS and not arguments.optim_args and not job.lora
    return bool(arguments.bf16 and plain and not is_sharded(arguments))


def is_sharded(arguments: Any) -> bool:
    """Tell whether FSDP spreads the weights over the processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" or bool(arguments.fsdp)
