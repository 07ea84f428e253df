"""The memory and the disk of a training, by the trainer's own formulas."""

from typing import Any

from distill_app.easydistill.params import TrainParams
from distill_app.planning.hardware import Device
from distill_app.planning.shapes import WEIGHT_BYTES, Shape, shape_of
from distill_app.training.config import SPLIT_OPTIMIZERS
from distill_app.training.memory import FULL, FULL_BYTES, HALF, SPLIT_BYTES, fixed_bytes, token_bytes

CHECKPOINT_BYTES = 12  # a trained parameter: weights, rests and moments


def is_checkpointed(params: TrainParams) -> bool:
    """Tell whether layers are computed again in the backward pass."""
    keys = ("gradient_checkpointing", "activation_checkpointing")
    return any(bool(params.training.get(key)) for key in keys)


def training_bytes(shape: Shape, params: TrainParams, device: Device, in_halves: bool = True) -> int:
    """Return the most bytes that a training has at one time, of one device.

    On a GPU with one example of max_length at a time, or tokens_at_a_time; on a CPU with what a step has.
    The trainer's formula adds up all that it ever holds; but layers have no gradients yet while the output
    layer's is summed up, and no activations any more once all gradients are there.
    """
    model = _with_adapters(shape, params) if params.lora_rank else shape.skeleton
    plain = params.training.get("optim", "adamw_torch") in SPLIT_OPTIMIZERS
    split = in_halves and plain and not params.lora_rank and params.accelerate != "fsdp"
    saved = int(shape.body * (HALF - WEIGHT_BYTES[params.quantization])) if params.lora_rank else 0
    step = params.batch_size * params.gradient_accumulation_steps * params.max_length
    tokens = max(params.max_length, params.tokens_at_a_time or (0 if device.is_gpu else step))
    activations = tokens * token_bytes(shape.config, is_checkpointed(params))
    learned = trained_parameters(model)
    weights = learned * (SPLIT_BYTES if split else FULL_BYTES)
    gradients = min(learned, shape.body) * (HALF if split else FULL)
    return max(fixed_bytes(model, split) + activations - gradients, weights) - saved


def trained_parameters(model: Any) -> int:
    """Return the number of parameters that a training moves."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def checkpoint_bytes(shape: Shape, params: TrainParams) -> int:
    """Return the bytes on disk: two checkpoints on the way, which go at the end, and the student."""
    model = _with_adapters(shape, params) if params.lora_rank else shape.skeleton
    return 2 * CHECKPOINT_BYTES * trained_parameters(model) + HALF * shape.parameters


def _with_adapters(shape: Shape, params: TrainParams) -> Any:
    """Return the skeleton of a frozen student with adapters on all linear layers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=params.lora_rank or 0)
    return get_peft_model(shape_of(shape.config).skeleton, config).get_base_model()
