"""LoRA: small matrices trained beside frozen weights, and added to them at the end (arXiv:2106.09685)."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distill_app.core.models import Model, load_trainable
from distill_app.training.config import Job


def load_with_adapters(job: Job) -> Model:
    """Return the student in bfloat16 or quantized, frozen, with trainable adapters.

    Raises:
        ValueError: a field that PEFT does not know, or a value that it refuses.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    with _told(job):
        config = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **(job.lora or {})})
    model, _ = load_trainable(job.models.student, True, job.models.quantization)
    if job.models.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():  # 4 bit on a CPU has a layout for inference, without gradients
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    with _told(job):
        return get_peft_model(model, config)


@contextmanager
def _told(job: Job) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as err:
        raise ValueError(f"{job.path}: lora: {' '.join(str(err).split())}; mend the field") from err


def merged(model: Any, student: str) -> Model:
    """Return the student's own weights, in float32 and never quantized, with the adapters added."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory(prefix="distill-adapters-") as folder:
        model.save_pretrained(folder)
        base, _ = load_trainable(student)
        return PeftModel.from_pretrained(base, folder).merge_and_unload()
