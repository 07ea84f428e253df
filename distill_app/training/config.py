"""Reading a training config: EasyDistill 1.0's keys, checked, and TRL's SFTConfig out of `training`.

Beside EasyDistill's own keys it knows, and EasyDistill ignores:

    dataset.too_long      "drop" (default) or "cut" examples over max_length tokens
    validation.fraction   of the training data, held out to choose the best checkpoint by; 0 for none
    validation.patience   evaluations without a better loss after which training stops; null for never
    lora                  fields of PEFT's LoraConfig; trains adapters and merges them at the end
    models.quantization   "8bit" or "4bit" (bitsandbytes), of a student under LoRA
    distillation.temperature
    source                the dataset that the records come from, which the model card names
    accelerate            "ddp", "fsdp" or an accelerate config file; `run_easy_distill` launches with it
    backend               "builtin" or "easydistill"; `run_easy_distill` reads it
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import Field

from distill_app.core.files import read_json
from distill_app.core.jobs import JOB_TYPES, Dataset, Models
from distill_app.core.logits import TopLogits
from distill_app.core.params import Section, check_section
from distill_app.training.losses import Divergence, Objective

OTHER_KEYS = ("inference", "training", "lora", "source", "accelerate", "backend")
RENAMED = ("warmup_ratio", "group_by_length")  # by transformers 5
# Of the fields that are SFTConfig's own, those with a meaning here; packed rows make the packing fields idle
SFT_FIELDS = (
    "max_length",
    "loss_type",
    "completion_only_loss",
    "assistant_only_loss",
    "packing",
    "packing_strategy",
    "padding_free",
    "pad_to_multiple_of",
    "eval_packing",
)
SPLIT_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


class TrainedModels(Models):
    """The `models` section of a training."""

    student: str


class Distillation(Section):
    """The `distillation` section of white-box jobs; see `losses.Objective`."""

    kd_ratio: float = Field(0.5, ge=0, le=1)
    distillation_type: Divergence = "forward_kld"
    temperature: float = Field(1.0, gt=0)
    max_seq_length: int | None = None


class Validation(Section):
    """The `validation` section."""

    fraction: float = Field(0.0, ge=0, lt=1)
    patience: int | None = Field(None, ge=1)


SECTIONS: dict[str, type[Section]] = {
    "dataset": Dataset,
    "models": TrainedModels,
    "distillation": Distillation,
    "validation": Validation,
}


@dataclass(frozen=True)
class Job:
    """A training config, checked."""

    path: str
    job_type: str
    dataset: Dataset
    models: TrainedModels
    distillation: Distillation
    validation: Validation
    training: dict[str, Any]
    lora: dict[str, Any] | None
    source: str | None = None

    @property
    def output_dir(self) -> str:
        """Where the finished checkpoint goes."""
        return str(self.training["output_dir"])

    @property
    def max_length(self) -> int | None:
        """Tokens of prompt and response, at most."""
        limit: int | None = self.training.get("max_length", self.distillation.max_seq_length)
        return limit

    @property
    def is_white_box(self) -> bool:
        """Whether the student learns from the teacher's probabilities too."""
        return self.job_type.startswith("kd_white_box")


def read_job(
    path: str | os.PathLike[str], labeled_path: str | None = None, logits_path: str | None = None
) -> Job:
    """Return the config as a job, with other data than the config names if it is given.

    Raises:
        FileNotFoundError, ValueError: the file is missing, malformed, or a key is missing, unknown or of a
            value that has no meaning; the key is named.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: found {type(config).__name__}, expected an object")
    job_type = config.get("job_type")
    if job_type not in JOB_TYPES:
        raise ValueError(f"{path}: job_type: found {job_type!r}, expected one of {', '.join(JOB_TYPES)}")
    _refuse_misspelt(path, config)
    given = {"labeled_path": labeled_path, "logits_path": logits_path}
    config["dataset"] = {**(config.get("dataset") or {}), **{k: v for k, v in given.items() if v}}
    sections: dict[str, Any] = {
        name: check_section(config.get(name) or {}, name, model, path) for name, model in SECTIONS.items()
    }
    training = config.get("training")
    if not isinstance(training, dict) or not training.get("output_dir"):
        raise ValueError(f"{path}: training.output_dir: missing; add it")
    source = config.get("source")
    if source is not None and not isinstance(source, str):
        raise ValueError(f"{path}: source: found {type(source).__name__}, expected the dataset's name")
    job = Job(str(path), job_type, training=training, lora=config.get("lora"), source=source, **sections)
    _refuse_contradictions(job)
    return job


def _refuse_misspelt(path: Any, config: dict[str, Any]) -> None:
    """EasyDistill ignores a top-level key that it does not know; one that is nearly ours is an error."""
    known = ("job_type", *SECTIONS, *OTHER_KEYS)
    for key in config:
        if key not in known and (near := get_close_matches(key, known, n=1)):
            raise ValueError(f"{path}: {key}: unknown key; did you mean {near[0]}?")


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


def objective_of(job: Job, logits: TopLogits | None, softcap: float | None) -> Objective:
    """Return what the job minimises."""
    return Objective(
        kd_ratio=0.0 if logits is None else job.distillation.kd_ratio,
        divergence=job.distillation.distillation_type,
        temperature=job.distillation.temperature,
        vocab_size=None if logits is None else logits.vocab_size,
        label_smoothing=job.training.get("label_smoothing_factor", 0.0),
        by_confidence=job.training.get("loss_type", "nll") == "dft",
        softcap=softcap,
    )


def sft_arguments(job: Job, work_dir: str, has_validation: bool = False) -> Any:
    """Return TRL's SFTConfig for the job: the config's keys over defaults that suit this machine.

    Raises:
        ValueError: an unknown key (the nearest valid one is named) or a value that TRL refuses.
    """
    import torch
    from transformers import TrainingArguments
    from trl import SFTConfig

    has_gpu = torch.cuda.is_available()
    options: dict[str, Any] = {
        "bf16": torch.cuda.is_bf16_supported() if has_gpu else _cpu_multiplies_bf16(),
        "use_cpu": not has_gpu,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job.dataset.seed,
        "data_seed": job.dataset.seed,
        "save_steps": 1000,
        "dataloader_pin_memory": has_gpu,
        "ddp_find_unused_parameters": False,
        **_in_current_names(job, {field.name for field in dataclasses.fields(SFTConfig)}),
    }
    _refuse_idle_fields(job, {f.name for f in dataclasses.fields(TrainingArguments)})
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
        "save_total_limit": None,  # old checkpoints go when a newer one is whole
        "average_tokens_across_devices": True,
        "packing": False,
        "padding_free": False,
    }
    if has_validation:
        strategy = options.get("save_strategy", "steps")
        if strategy == "no":
            strategy = options["save_strategy"] = "steps"
        options |= {
            "eval_strategy": strategy,
            "eval_steps": options.get("eval_steps") or options["save_steps"],
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
        options["save_steps"] = options["eval_steps"]
    try:
        return SFTConfig(**options)
    except (TypeError, ValueError) as err:
        raise ValueError(f"{job.path}: training: {' '.join(str(err).split())}") from err


def logging_steps(job: Job) -> int:
    """Return over how many steps a point of the written loss curve is averaged."""
    found = job.training.get("logging_steps", 10)
    return max(1, math.floor(found)) if found >= 1 else 1


def token_budget(job: Job) -> int:
    """Return how many tokens go through the model at a time: the most that a batch of the config may have."""
    return int(job.training.get("per_device_train_batch_size", 8)) * (job.max_length or 512)


def _in_current_names(job: Job, valid: set[str]) -> dict[str, Any]:
    """Return `training` with the names that transformers 5 dropped replaced by today's."""
    options = dict(job.training)
    if "warmup_ratio" in options:
        options["warmup_steps"] = options.get("warmup_steps") or options.pop("warmup_ratio")
        options.pop("warmup_ratio", None)
    options.pop("group_by_length", None)  # packed rows have no padding that grouping would save
    for key in options:
        if key not in valid:
            near = get_close_matches(key, [*valid, *RENAMED], n=1)
            hint = f"did you mean {near[0]}?" if near else "remove it"
            raise ValueError(f"{job.path}: training.{key}: unknown to SFTConfig; {hint}")
    return options


def _refuse_idle_fields(job: Job, general: set[str]) -> None:
    """Raise ValueError for a field of SFTConfig's own that the built-in trainer would not act on."""
    for key in job.training:
        patches_model = key == "use_liger_kernel" and job.training[key]
        if patches_model or key not in {*general, *SFT_FIELDS, *RENAMED}:
            raise ValueError(
                f"{job.path}: training.{key}: has no effect in the built-in trainer (records, template and"
                " tokenizer come from `dataset` and `models`); remove it"
            )


def splits_weights(job: Job, arguments: Any) -> bool:
    """Tell whether the student trains in bfloat16 with its float32 rests in the optimizer.

    Other optimizers, adapters and sharded weights train in float32 under autocast.
    """
    plain = arguments.optim in SPLIT_OPTIMIZERS and not arguments.optim_args and not job.lora
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" or bool(arguments.fsdp)
    return bool(arguments.bf16 and plain and not sharded and not arguments.deepspeed)


def _cpu_multiplies_bf16() -> bool:
    """Tell whether the CPU has bfloat16 matrix products; without them autocast is slower than float32."""
    import torch

    flags = torch.cpu.get_capabilities()
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("amx_tile"))
