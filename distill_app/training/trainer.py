"""TRL's SFTTrainer with a faster loss, and progress that a person can read."""

import sys
import time
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback
from trl import SFTTrainer

from distill_app.training.examples import NO_LOSS

REPORT_EVERY_SEC = 10.0


class ResponseTrainer(SFTTrainer):
    """SFTTrainer whose output layer runs only where there is a label.

    The 49,152-wide output layer is a fifth of a small model's work, and two thirds of a batch may be
    prompt. TRL's own loss also computes entropies that nobody reads. With any loss option beyond plain
    negative log-likelihood the work goes to TRL.
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the summed token loss over `num_items_in_batch`, the labels of the whole step: so that
        gradient accumulation weighs tokens, not micro-batches."""
        plain = getattr(self.args, "loss_type", "nll") == "nll" and not self.args.label_smoothing_factor
        if return_outputs or not plain or self.aux_loss_enabled:
            with self.accelerator.autocast():
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        keep = labels != NO_LOSS
        inner = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            # No attention mask: padding is on the right, where a causal model's labelled tokens never look,
            # and without a mask attention takes its faster path.
            hidden = inner.get_decoder()(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
            logits = inner.get_output_embeddings()(hidden[:, :-1][keep])
        loss = cross_entropy(logits.float(), labels[keep], reduction="sum")
        count = keep.sum() if num_items_in_batch is None else num_items_in_batch
        return loss / count


class Progress(TrainerCallback):
    """Keeps the loss curve, and prints step, loss, tokens per second and time left every ten seconds."""

    def __init__(self, tokens_per_epoch: int) -> None:
        self.tokens_per_epoch = tokens_per_epoch
        self.curve: list[dict[str, float]] = []
        self.start = self.reported = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start = self.reported = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep a point of the loss curve."""
        if logs and "loss" in logs:
            self.curve.append({"step": state.global_step, "loss": round(float(logs["loss"]), 4)})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print a line every so often and at the end."""
        now, last = time.monotonic(), state.global_step == state.max_steps
        if now - self.reported < REPORT_EVERY_SEC and not last:
            return
        self.reported = now
        taken = now - self.start
        done = state.global_step / state.max_steps
        rate = self.tokens_per_epoch * state.num_train_epochs * done / taken
        left = f"{taken:.0f} s" if last else f"about {taken / done - taken:.0f} s left"
        loss = f"loss {self.curve[-1]['loss']:.3f}, " if self.curve else ""
        print(
            f"training: step {state.global_step} of {state.max_steps}, {loss}{rate:.0f} tokens/s, {left}",
            file=sys.stderr,
            flush=True,
        )


def set_deterministic(seed: int) -> None:
    """Make a run repeatable to the bit on one machine."""
    from transformers import set_seed

    set_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
