"""Writing EasyDistill 1.0 configs: one JSON file a training, and the prompt template beside it.

Source of the keys: EasyDistill v1.0.0, configs/kd_black_box_local.json; it ignores top-level keys that it
does not know, and ours are such.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_app.core.files import save_json, save_text
from distill_app.core.prompts import Mode, chat_template

TRAINING_DEFAULTS: dict[str, Any] = {  # EasyDistill's own example for Qwen2.5-7B to 0.5B
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "max_length": 512,
    "save_steps": 1000,
    "logging_steps": 1,
    "learning_rate": 2e-5,
    "weight_decay": 0.05,
    "warmup_ratio": 0.1,
    "lr_scheduler_type": "cosine",
}
INFERENCE_DEFAULTS: dict[str, Any] = {
    "enable_chunked_prefill": True,
    "seed": 777,
    "gpu_memory_utilization": 0.9,
    "temperature": 0.8,
    "trust_remote_code": False,
    "enforce_eager": False,
    "max_model_len": 4096,
    "max_new_tokens": 512,
}


def write_system1_config(
    config_path: str = "configs/kd_black_box_qwen_0_5b.json",
    teacher_model: str = "Qwen/Qwen2.5-7B-Instruct",
    student_model: str = "Qwen/Qwen2.5-0.5B-Instruct",
    instruction_path: str = "data/train_instructions.json",
    labeled_path: str = "data/train_labeled.json",
    out_dir: str = "./distilled-qwen2.5-0.5b",
    num_epochs: float = 1,
    template_path: str | None = None,
    training: Mapping[str, Any] | None = None,
    seed: int = 42,
    backend: str | None = None,
    extra: Mapping[str, Any] | None = None,
    teacher_revision: str | None = None,
) -> str:
    """Write the config that distils System 1 (`kd_black_box_local`); return `config_path`.

    Args:
        template_path: a Jinja file of EasyDistill's kind; without it ours is written beside the config.
        training: fields of TRL's SFTConfig that replace or add to the defaults.
        backend: "builtin" or "easydistill"; None leaves the choice to `run_easy_distill`.
        extra: keys and sections that replace or add to these; see `distill_app.easydistill.job`.
        teacher_revision: of a Hub teacher, for the card.
    """
    revision = {"teacher_revision": teacher_revision} if teacher_revision else {}
    config = {
        "job_type": "kd_black_box_local",
        "dataset": {
            "instruction_path": instruction_path,
            "labeled_path": labeled_path,
            "template": template_path or _write_template(config_path, "system1"),
            "seed": seed,
        },
        "inference": INFERENCE_DEFAULTS,
        "models": {"teacher": teacher_model, **revision, "student": student_model},
        "training": _training(out_dir, num_epochs, training),
    }
    return _write(config_path, config, backend, extra)


def write_system2_config(
    config_path: str = "configs/kd_cot_qwen_1_5b.json",
    student_model: str = "Qwen/Qwen2.5-1.5B-Instruct",
    cot_path: str = "data/omnithought_cot.json",
    out_dir: str = "./distilled-qwen2.5-1.5b-cot",
    num_epochs: float = 1,
    template_path: str | None = None,
    training: Mapping[str, Any] | None = None,
    seed: int = 42,
    backend: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> str:
    """Write the config that distils System 2 (`kd_black_box_train_only`); return `config_path`.

    The arguments are those of `write_system1_config`; `cot_path` is the labelled data.
    """
    config = {
        "job_type": "kd_black_box_train_only",
        "dataset": {
            "labeled_path": cot_path,
            "template": template_path or _write_template(config_path, "system2"),
            "seed": seed,
        },
        "models": {"student": student_model},
        # Chains of thought are long: at System 1's 512 tokens most would be left out
        "training": _training(out_dir, num_epochs, {"max_length": 4096, **(training or {})}),
    }
    return _write(config_path, config, backend, extra)


def _training(out_dir: str, num_epochs: float, training: Mapping[str, Any] | None) -> dict[str, Any]:
    options = {"output_dir": out_dir, "num_train_epochs": num_epochs}
    return {**options, **TRAINING_DEFAULTS, **(training or {})}


def _write_template(config_path: str, mode: Mode) -> str:
    """Write the prompt's template beside the config and return its path."""
    path = Path(config_path).with_suffix(".jinja")
    save_text(path, chat_template(mode))
    return path.as_posix()


def _write(
    config_path: str, config: dict[str, Any], backend: str | None, extra: Mapping[str, Any] | None
) -> str:
    if backend:
        config["backend"] = backend
    for key, value in (extra or {}).items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, Mapping) else value
    save_json(config_path, config)
    return config_path
