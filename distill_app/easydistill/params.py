"""The `train_s1` and `train_s2` sections of params.yaml."""

from typing import Literal

from pydantic import Field

from distill_app.core.params import Section


class TrainParams(Section):
    """One student's training."""

    student: str  # Hub id or checkpoint folder to start from
    backend: Literal["builtin", "easydistill"]
    num_epochs: float = Field(gt=0)
    batch_size: int = Field(ge=1)  # examples a device and step
    gradient_accumulation_steps: int = Field(ge=1)
    max_length: int = Field(ge=8)  # tokens, prompt and answer; longer examples are dropped and counted
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    warmup_ratio: float = Field(ge=0, lt=1)
    lr_scheduler_type: str
    logging_steps: int = Field(ge=1)
    seed: int

    def training_options(self) -> dict[str, object]:
        """Return what goes into `training` of the config, in EasyDistill 1.0's names."""
        return {
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "max_length": self.max_length,
            "logging_steps": self.logging_steps,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "warmup_ratio": self.warmup_ratio,
            "lr_scheduler_type": self.lr_scheduler_type,
        }
