"""LoRA: small matrices trained beside frozen weights, and added to them at the end (arXiv:2106.09685)."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distill_app.core.models import Model, load_trainable
from distill_app.easydistill.job import Job


def load_with_adapters(job: Job) -> Model:
    """Return the student in bfloat16 or quantized, frozen, with trainable adapters.

    Raises:
        ValueError: a field that PEFT does not know, a value that it refuses, or adapters that cannot be
            merged into the student at the end.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    with _named(job):
        config = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **(job.lora or {})})
    student, revision = job.models.student, job.models.student_revision
    model, _ = load_trainable(student, True, job.models.quantization, revision)
    if job.models.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():  # 4 bit on a CPU has a layout for inference, without gradients
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    with _named(job):
        adapted = get_peft_model(model, config)
        _refuse_shared_weights(model)
        _refuse_biases_without_place(model)
    return adapted


def _refuse_shared_weights(model: Model) -> None:
    """Adapters of one of two layers with the same weights cannot be merged into it alone."""
    import torch

    if not model.config.tie_word_embeddings:
        return
    for name, layer in (
        ("output layer", model.get_output_embeddings()),
        ("embeddings", model.get_input_embeddings()),
    ):
        if not isinstance(layer, (torch.nn.Linear, torch.nn.Embedding)):
            raise ValueError(
                f"found adapters on the {name}, expected none: output layer and embeddings share their"
                " weights, and merging would change both"
            )


def _refuse_biases_without_place(model: Model) -> None:
    """A bias of an adapter can only be merged into one of its layer."""
    for name, layer in model.named_modules():
        has_bias = any(getattr(layer, "lora_bias", {}).values())
        if has_bias and getattr(layer.get_base_layer(), "bias", None) is None:
            raise ValueError(
                f"lora_bias: found a bias beside {name}, which has none to merge it into, expected layers"
                " that have one"
            )


@contextmanager
def _named(job: Job) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as err:
        raise ValueError(f"{job.path}: lora: {' '.join(str(err).split())}; fix the field") from err


def merged(model: Any, job: Job) -> Model:
    """Return the student's own weights, in float32 and never quantized, with the adapters added."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory(prefix="distill-adapters-") as folder:
        model.save_pretrained(folder)
        base, _ = load_trainable(job.models.student, revision=job.models.student_revision)
        return PeftModel.from_pretrained(base, folder).merge_and_unload()
