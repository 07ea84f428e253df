"""How long the three kinds of work take on a device: reading texts, writing answers, training.

Each is a sum of operations by the operations a second that are reached, and of bytes moved by the bandwidth.
"""

from dataclasses import dataclass

from distill_app.planning.hardware import Device
from distill_app.planning.shapes import Shape

BACKWARD = 3.0  # operations of a training to those of the forward pass
RECOMPUTED = 4.0  # the same where layers are computed again (gradient checkpointing)


@dataclass(frozen=True)
class Texts:
    """Prompts and answers: how many, and their tokens in all."""

    count: float
    prompt_tokens: float
    answer_tokens: float

    @property
    def tokens(self) -> float:
        return self.prompt_tokens + self.answer_tokens

    @property
    def length(self) -> float:
        """Return the mean tokens of a text."""
        return self.tokens / self.count if self.count else 0.0

    def __mul__(self, share: float) -> "Texts":
        return Texts(self.count * share, self.prompt_tokens * share, self.answer_tokens * share)


def forward_flops(shape: Shape, texts: Texts) -> float:
    """Return the operations of one pass over the texts; the output layer runs at answers alone."""
    return shape.token_flops(texts.length) * texts.tokens + 2.0 * shape.head * texts.answer_tokens


def reading_seconds(shape: Shape, texts: Texts, device: Device) -> float:
    """Return the seconds of one pass over texts."""
    return forward_flops(shape, texts) / device.reached_flops


def writing_seconds(
    shape: Shape, texts: Texts, longest: float, rows: int, device: Device, weight_bytes: float
) -> float:
    """Return the seconds in which a model reads prompts and writes answers, at most `rows` at a time.

    Args:
        longest: tokens of the longest answer. A row that ends makes room for the next prompt, so passes are
            those of the longest answer and of what all others take side by side.
    """
    rows = max(1, min(rows, round(texts.count)))
    passes = longest + texts.answer_tokens / rows if texts.count > rows else longest
    moved = passes * weight_bytes + texts.answer_tokens * shape.kv_bytes() * texts.length
    return (
        reading_seconds(shape, texts, device)
        + moved / device.reached_bandwidth
        + passes * shape.layers * device.layer_sec
    )


def training_seconds(
    shape: Shape, texts: Texts, epochs: float, steps: float, device: Device, checkpointed: bool = False
) -> float:
    """Return the seconds of so many epochs over the texts, in `steps` steps of the optimizer altogether."""
    flops = epochs * forward_flops(shape, texts) * (RECOMPUTED if checkpointed else BACKWARD)
    moved = steps * shape.parameters * device.step_bytes
    return flops / device.reached_flops + moved / device.reached_bandwidth
