"""The loss curve, and what a person sees of a training that runs."""

import sys
import time
from typing import Any

from transformers import TrainerCallback

REPORT_EVERY_SEC = 10.0


class Progress(TrainerCallback):
    """Prints step, loss, tokens per second and time left every ten seconds; evaluates once more at the end.

    Args:
        tokens_seen: returns the tokens trained on since this process began.
    """

    def __init__(self, tokens_seen: Any, has_validation: bool) -> None:
        self.tokens_seen, self.has_validation = tokens_seen, has_validation
        self.start = self.reported = 0.0
        self.first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; end a training that has nothing left to do."""
        self.start = self.reported = time.monotonic()
        self.first = state.global_step
        if state.global_step == state.max_steps:  # it goes on from the very last checkpoint
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for the last evaluation and checkpoint, from which the best is chosen."""
        if self.has_validation and state.global_step == state.max_steps:
            control.should_evaluate = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print a line every so often, after each evaluation and at the end."""
        if not state.is_world_process_zero or not logs or not {"loss", "eval_loss"} & set(logs):
            return
        now, last = time.monotonic(), state.global_step == state.max_steps
        if now - self.reported < REPORT_EVERY_SEC and not last and "eval_loss" not in logs:
            return
        self.reported = now
        taken = now - self.start
        done = state.global_step - self.first
        left = f"{taken:.0f} s"
        if not last and done:  # an evaluation before the first step has done nothing yet
            left = f"{taken / done * (state.max_steps - state.global_step):.0f} s left"
        named = {"loss": "loss", "eval_loss": "held-out loss"}
        losses = ", ".join(f"{name} {logs[key]:.3f}" for key, name in named.items() if key in logs)
        rate = self.tokens_seen() / taken
        print(
            f"training: step {state.global_step} of {state.max_steps}, {losses}, {rate:.0f} tokens/s, {left}",
            file=sys.stderr,
            flush=True,
        )


class Patience(TrainerCallback):
    """Ends a training after so many evaluations without a better loss.

    It counts them in the log, which a checkpoint holds: a resumed training ends where an unbroken one does.
    """

    def __init__(self, evaluations: int) -> None:
        self.evaluations = evaluations

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a training that goes on from the checkpoint at which it had ended."""
        self.on_evaluate(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count again."""
        losses = list({e["step"]: e["eval_loss"] for e in state.log_history if "eval_loss" in e}.values())
        if losses and len(losses) - losses.index(min(losses)) > self.evaluations:
            control.should_training_stop = True


def loss_curve(log: list[dict[str, Any]], every: int) -> list[tuple[int, float]]:
    """Return (step, mean training loss of the last `every` steps), the last step included."""
    steps = [(int(entry["step"]), float(entry["loss"])) for entry in log if "loss" in entry]
    points = []
    for start in range(0, len(steps), every):
        group = steps[start : start + every]
        points.append((group[-1][0], round(sum(loss for _, loss in group) / len(group), 4)))
    return points


def validation_curve(log: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, loss on the held-out examples)."""
    points = {int(e["step"]): round(float(e["eval_loss"]), 4) for e in log if "eval_loss" in e}
    return sorted(points.items())
