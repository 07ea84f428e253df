"""Trains a model of a real one's shape, with random weights and tokens: speed, MFU, memory."""

import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, TrainerCallback, TrainingArguments

from distill_app.evaluation.asking.cost import status_bytes
from distill_app.planning.hardware import GPUS
from distill_app.training.batches import Collator
from distill_app.training.examples import NO_LOSS, Example
from distill_app.training.losses import Objective
from distill_app.training.memory import fixed_bytes, token_bytes
from distill_app.training.trainer import DistillationTrainer, set_deterministic

PROMPT_SHARE = 0.25  # of an example, without loss
SHAPES: dict[str, dict[str, Any]] = {  # of Qwen2.5's configs
    "qwen2.5-0.5b": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "qwen2.5-0.5b/16": {  # its proportions, for a machine without memory
        "vocab_size": 8192,
        "hidden_size": 224,
        "intermediate_size": 1216,
        "num_hidden_layers": 6,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
# Dense bfloat16 products a second; a name's first match counts
PEAKS = {name.split("-")[0].upper(): gpu.flops for name, gpu in GPUS.items()}


@dataclass(frozen=True)
class Run:
    """What a training took."""

    device: str
    tokens_a_second: float
    share: float  # of the device's products a second, MFU
    reference: str  # what that is a share of
    peak_bytes: int
    expected_bytes: int  # by training/memory.py

    def __str__(self) -> str:
        return (
            f"{self.device}: {self.tokens_a_second:.0f} tokens/s, MFU {self.share:.1%} of {self.reference},"
            f" peak {self.peak_bytes / 1e9:.2f} GB (formula: {self.expected_bytes / 1e9:.2f} GB)"
        )


def run_shape(shape: str, tokens: int, length: int, steps: int, checkpointed: bool = False) -> Run:
    """Train some steps of `tokens` tokens in examples of `length`; the first is not timed."""
    if shape not in SHAPES:
        raise SystemExit(f"--shape: found {shape}, expected one of {', '.join(SHAPES)}")
    on_gpu = torch.cuda.is_available()
    before = status_bytes("VmHWM")  # getrusage counts what it was forked from too
    with tempfile.TemporaryDirectory(prefix="bench-shape-") as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=tokens // length,
            max_steps=steps,
            learning_rate=2e-5,
            bf16=True,
            use_cpu=not on_gpu,
            activation_checkpointing=checkpointed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            dataloader_pin_memory=on_gpu,
        )
        set_deterministic(0)
        config = Qwen2Config(**SHAPES[shape])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        clock = _Clock()
        trainer = DistillationTrainer(
            model,
            Objective(),
            tokens,
            split_weights=True,
            args=arguments,
            data_collator=Collator(),
            train_dataset=_examples(config.vocab_size, length, steps * tokens // length),
            callbacks=[clock],
        )
        trainer.train()
    reference, products = _products_a_second(arguments.device)
    speed = tokens * (steps - 1) / (clock.times[-1] - clock.times[0])
    return Run(
        torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        speed,
        speed * _products_a_token(model, length) / products,
        reference,
        torch.cuda.max_memory_allocated() if on_gpu else clock.peak_bytes - before,
        fixed_bytes(model, split=True) + tokens * token_bytes(config, checkpointed),
    )


class _Clock(TrainerCallback):
    """Notes when each step ended, and the most memory that the process had had by then."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.peak_bytes = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called once the optimizer has moved the weights."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.monotonic())
        self.peak_bytes = status_bytes("VmHWM")


def _examples(vocabulary: int, length: int, count: int) -> list[Example]:
    make = torch.Generator().manual_seed(0)
    prompt = int(PROMPT_SHARE * length)
    found = []
    for row in range(count):
        ids = torch.randint(vocabulary, (length,), generator=make).tolist()
        found.append(Example(ids, [NO_LOSS] * prompt + ids[prompt:], row))
    return found


def _products_a_token(model: Any, length: int) -> float:
    """Return the floating-point operations that a token needs, forward and backward: 6 a weight.

    Attention's are of a causal row; what checkpointing computes again does not count. Source of the count:
    PaLM, arXiv:2204.02311, appendix B.
    """
    config = model.config
    output = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters()) - output  # the weights are tied
    attention = config.num_hidden_layers * config.hidden_size * length
    return 6.0 * (body + (1 - PROMPT_SHARE) * output + attention)


def _products_a_second(device: torch.device) -> tuple[str, float]:
    """Return what a device can do at best: of its data sheet, else of one large product, measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS.items():
            if known in name:
                return f"{known}'s {peak / 1e12:.0f} TFLOP/s", peak
    size = 4096 if device.type == "cuda" else 2048
    one = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(5):
        start = time.monotonic()
        float((one @ one)[0, 0])  # waits for the device
        seconds.append(time.monotonic() - start)
    reached = 2 * size**3 / min(seconds)
    return f"the {reached / 1e12:.2f} TFLOP/s that one product reaches", reached
