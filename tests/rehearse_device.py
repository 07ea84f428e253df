"""Trainer and engine on a device that is not the CPU; `python tests/rehearse_device.py PART [FAULT]`.

A process of its own, since torch counts its devices once. It exits with 0 where the results are those of the
CPU, and fails where a fault is planted: a tensor left on the CPU.
"""

import os
import sys
from pathlib import Path

import devices
import torch
from conftest import make_tiny_model
from trainings import OURS, RECORDS, write_job
from transformers import PreTrainedModel, training_args

from distill_app.core.models import load_student, load_trainable
from distill_app.easydistill.job import read_job
from distill_app.generation import batch
from distill_app.generation.answers import Sampling
from distill_app.generation.slots import Slots
from distill_app.training import packing
from distill_app.training.batches import Collator
from distill_app.training.config import objective_of, sft_arguments, splits_weights
from distill_app.training.examples import build_examples
from distill_app.training.trainer import DistillationTrainer, check_output_layer, set_deterministic


def trained(attention, device, **training):
    """Train for two epochs with an evaluation; return its losses and those on held-out examples."""
    path = write_job(
        "student", bf16=True, use_cpu=device.type == "cpu", learning_rate=1e-3, save_strategy="no", **training
    )
    job = read_job(path)
    arguments = sft_arguments(job, "work")
    set_deterministic(0)
    assert arguments.device == device and splits_weights(job, arguments)
    model, tokenizer = load_trainable("student", in_bfloat16=True)
    examples = build_examples(RECORDS, tokenizer, OURS).train
    check_output_layer(model, examples[0], None)
    packing.choose_attention = lambda config, where, in_half: attention
    made = DistillationTrainer(
        model,
        objective_of(job, None, None),
        100,
        True,
        args=arguments,
        data_collator=Collator(),
        train_dataset=examples,
        eval_dataset=examples[:3],
    )
    assert model.device == device
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return [*losses, made.evaluate()["eval_loss"], *(loss for loss, _ in made.example_losses(examples[:2]))]


def train(attention, **training):
    """Compare a training on the device with one on the CPU."""
    on_cpu = trained(attention, torch.device("cpu"), **training)
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{devices.NAME}:0"
    training_args.is_torch_bf16_gpu_available = lambda: True
    with devices.other_device() as device:
        losses = trained(attention, device, **training)
    assert len(losses) == 9 and losses[5] < losses[0] / 1.2
    # In bfloat16 other shapes round otherwise, and each step adds to it
    assert abs(losses[0] / on_cpu[0] - 1) < 2e-3
    assert torch.allclose(torch.tensor(losses), torch.tensor(on_cpu), rtol=0.05)


def answer():
    """Compare the engine's answers on the device with those on the CPU."""
    prompts = [record["instruction"] for record in RECORDS]
    model, tokenizer = load_student("student")
    for sampling in (Sampling(12), Sampling(12, 0.8, 0.9)):
        expected = batch.generate(model.cpu(), tokenizer, prompts, sampling, 4)
        with devices.other_device() as device:
            found = batch.generate(model.to(device), tokenizer, prompts, sampling, 4)
        assert found == expected and len({answer.text for answer in found}) > 3


def left_on_the_cpu(module, name):
    """Have a function return a tensor on the CPU, or of a batch its positions."""
    real = getattr(module, name)

    def misplaced(*args, **kwargs):
        found = real(*args, **kwargs)
        if isinstance(found, dict):
            return {**found, "position_ids": found["position_ids"].cpu()}
        return found.cpu() if isinstance(found, torch.Tensor) else (*found[:-1], found[-1].cpu())

    setattr(module, name, misplaced)


FAULTS = {
    "batch": lambda: left_on_the_cpu(DistillationTrainer, "_placed"),
    "ends": lambda: left_on_the_cpu(packing, "ends_of"),
    "slots": lambda: setattr(Slots, "_running_on", lambda self, device: next(iter(self._running.values()))),
    "ids": lambda: setattr(PreTrainedModel, "device", property(lambda self: torch.device("cpu"))),
    "mask": lambda: left_on_the_cpu(packing, "_hidden"),
}
PARTS = {
    "varlen": lambda: train(packing.VARLEN),
    "masked": lambda: train(packing.MASKED),
    "blocks": lambda: train(packing.BLOCKS),
    "checkpointed": lambda: train(packing.VARLEN, gradient_checkpointing=True),
    "engine": answer,
}


if __name__ == "__main__":
    part, *faults = sys.argv[1:]
    if not Path("student").exists():
        make_tiny_model(Path("student"))
    devices.register()
    devices.install_varlen_kernels()
    for fault in faults:
        FAULTS[fault]()
    PARTS[part]()
