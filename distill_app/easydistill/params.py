"""The `train_s1` and `train_s2` sections of params.yaml."""

from typing import Any, Literal

from pydantic import Field

from distill_app.core.models import Quantization
from distill_app.core.params import Section


class TrainParams(Section):
    """One student's training."""

    student: str  # Hub id or checkpoint folder to start from
    backend: Literal["builtin", "easydistill"]
    accelerate: str | None  # ddp, fsdp, or an accelerate config file; null trains in one process
    num_epochs: float = Field(gt=0)
    batch_size: int = Field(ge=1)  # examples a device and step
    gradient_accumulation_steps: int = Field(ge=1)
    max_length: int = Field(ge=8)  # tokens, prompt and answer
    too_long: Literal["drop", "cut"]
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    warmup_ratio: float = Field(ge=0, lt=1)
    lr_scheduler_type: str
    logging_steps: int = Field(ge=1)
    validation_fraction: float = Field(ge=0, lt=1)
    save_steps: int = Field(ge=1)  # between checkpoints, and between evaluations
    patience: int | None = Field(ge=1)
    lora_rank: int | None = Field(ge=1)
    lora_alpha: int = Field(ge=1)
    quantization: Quantization
    seed: int

    def training_options(self) -> dict[str, Any]:
        """Return what goes into `training` of the config, in EasyDistill 1.0's names."""
        options = {
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "max_length": self.max_length,
            "logging_steps": self.logging_steps,
            "save_steps": self.save_steps,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "warmup_ratio": self.warmup_ratio,
            "lr_scheduler_type": self.lr_scheduler_type,
        }
        return options | ({"eval_steps": self.save_steps} if self.validation_fraction else {})

    def extra_sections(self) -> dict[str, Any]:
        """Return the sections and keys of the config that are ours, where they are not at rest."""
        sections: dict[str, Any] = {"dataset": {"too_long": self.too_long}, "backend": self.backend}
        if self.validation_fraction:
            sections["validation"] = {"fraction": self.validation_fraction, "patience": self.patience}
        if self.lora_rank:
            sections["lora"] = {"r": self.lora_rank, "lora_alpha": self.lora_alpha}
        if self.quantization != "none":
            sections["models"] = {"quantization": self.quantization}
        if self.accelerate:
            sections["accelerate"] = self.accelerate
        return sections


class WordsAndProbabilities(TrainParams):
    """System 1's training, which may learn from the teacher's probabilities (`label.top_logits`) too."""

    kd_ratio: float = Field(ge=0, le=1)
    kd_type: Literal["forward_kld", "reverse_kld"]
    kd_temperature: float = Field(gt=0)

    def extra_sections(self) -> dict[str, Any]:
        """Return the white-box sections as well, where there is a share of probabilities."""
        sections = super().extra_sections()
        if self.kd_ratio:
            sections["job_type"] = "kd_white_box_train_only"
            sections["dataset"]["logits_path"] = "data/train_logits.arrow"
            sections["distillation"] = {
                "kd_ratio": self.kd_ratio,
                "distillation_type": self.kd_type,
                "temperature": self.kd_temperature,
            }
        return sections
