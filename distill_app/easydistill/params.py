"""The `train_s1` and `train_s2` sections of params.yaml."""

from typing import Any, Literal

from pydantic import Field, field_validator

from distill_app.core.models import Quantization
from distill_app.core.params import Section

# Fields of SFTConfig that have a param of their own, and what that is called
OWN_PARAMS = {
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "max_length": "max_length",
    "logging_steps": "logging_steps",
    "save_steps": "save_steps",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "warmup_ratio": "warmup_ratio",
    "lr_scheduler_type": "lr_scheduler_type",
}
ELSEWHERE = {
    "num_train_epochs": "num_epochs",
    "seed": "seed",
}  # the same, but not in `training` of the config


class TrainParams(Section):
    """One student's training."""

    student: str  # Hub id or checkpoint folder to start from
    revision: str | None  # of a Hub student: commit, tag or branch
    backend: Literal["builtin", "easydistill"]
    accelerate: str | None  # ddp, fsdp, or an accelerate config file; null trains in one process
    num_epochs: float = Field(gt=0)
    batch_size: int = Field(ge=1)  # examples a device and step
    gradient_accumulation_steps: int = Field(ge=1)
    tokens_per_step: int | None = Field(ge=1)  # about, on all devices together, in place of examples
    tokens_at_a_time: int | None = Field(ge=1)  # through the model; null for what memory holds
    max_length: int = Field(ge=8)  # tokens, prompt and answer
    too_long: Literal["drop", "cut"]
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    warmup_ratio: float = Field(ge=0, lt=1)
    lr_scheduler_type: str
    logging_steps: int = Field(ge=1)
    kd_ratio: float = Field(ge=0, le=1)  # share of the teacher's probabilities in the loss
    kd_type: Literal["forward_kld", "reverse_kld"]
    kd_temperature: float = Field(gt=0)
    validation_fraction: float = Field(ge=0, lt=1)
    save_steps: int = Field(ge=1)  # between checkpoints, and between evaluations
    patience: int | None = Field(ge=1)
    lora_rank: int | None = Field(ge=1)
    lora_alpha: int = Field(ge=1)
    quantization: Quantization
    training: dict[str, Any]  # any other field of SFTConfig; `training.config.check_training` checks them
    seed: int

    @field_validator("training")
    @classmethod
    def _nothing_twice(cls, fields: dict[str, Any]) -> dict[str, Any]:
        for key in fields:
            if name := (OWN_PARAMS | ELSEWHERE).get(key):
                raise ValueError(f"{key} is the param {name} beside it; set that")
            if key == "output_dir":
                raise ValueError("output_dir is what dvc.yaml names; remove it")
        return fields

    def training_options(self) -> dict[str, Any]:
        """Return what goes into `training` of the config, in EasyDistill 1.0's names."""
        options = {key: getattr(self, name) for key, name in OWN_PARAMS.items()}
        return options | ({"eval_steps": self.save_steps} if self.validation_fraction else {}) | self.training

    def extra_sections(self, logits_path: str) -> dict[str, Any]:
        """Return the sections and keys of the config that are ours, where they are not at rest.

        Args:
            logits_path: the file of the teacher's probabilities.
        """
        sections: dict[str, Any] = {"dataset": {"too_long": self.too_long}, "backend": self.backend}
        if self.validation_fraction:
            sections["validation"] = {"fraction": self.validation_fraction, "patience": self.patience}
        tokens = {"tokens_per_step": self.tokens_per_step, "tokens_at_a_time": self.tokens_at_a_time}
        if any(tokens.values()):
            sections["batching"] = tokens
        if self.lora_rank:
            sections["lora"] = {"r": self.lora_rank, "lora_alpha": self.lora_alpha}
        models = {"student_revision": self.revision} if self.revision else {}
        if self.quantization != "none":
            models["quantization"] = self.quantization
        if models:
            sections["models"] = models
        if self.accelerate:
            sections["accelerate"] = self.accelerate
        if self.kd_ratio:
            sections["job_type"] = "kd_white_box_train_only"
            sections["dataset"]["logits_path"] = logits_path
            sections["distillation"] = {
                "kd_ratio": self.kd_ratio,
                "distillation_type": self.kd_type,
                "temperature": self.kd_temperature,
            }
        return sections
