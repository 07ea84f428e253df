"""The loss of a response's tokens: cross-entropy on hard labels, mixed with KL to the teacher's distribution.

The output layer runs where there is a label and nowhere else, a chunk at a time, and its gradient is taken
in the forward pass: so the logits of a whole batch, `(tokens, vocabulary)`, never exist at once.
Source of the chunking: Hsu et al., Liger Kernel, arXiv:2410.10989, section 3.2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from distill_app.core.logits import TAIL_FLOOR
from distill_app.easydistill.job import Divergence

CHUNK_TOKENS = 128  # whose logits exist at once in float32: 25 MB a copy at 49,152 words
GROUP_TOKENS = 1024  # whose gradients exist at once in the model's type: one product for all hidden states


@dataclass(frozen=True)
class Objective:
    """What is minimised for each token: `(1 - kd_ratio) * cross-entropy + kd_ratio * KL`.

    Args:
        kd_ratio: 0 learns from hard labels alone. Where a token has no distribution of the teacher's, its
            hard label counts alone and in full.
        divergence: "forward_kld" is KL(teacher || student), "reverse_kld" KL(student || teacher).
        temperature: both distributions are flattened by it, and the KL multiplied by its square
            (Hinton et al., arXiv:1503.02531).
        vocab_size: logits beyond the vocabulary that teacher and student share are padding of the output
            layer and take no part in the KL; None where there is no teacher.
    """

    kd_ratio: float = 0.0
    divergence: Divergence = "forward_kld"
    temperature: float = 1.0
    vocab_size: int | None = None
    label_smoothing: float = 0.0
    by_confidence: bool = False  # DFT: each label weighs what the student gives it, arXiv:2508.05629
    softcap: float | None = None  # of the model's own logits, as in Gemma 2

    def token_losses(self, logits: Tensor, targets: Tensor, teacher: "Teacher | None" = None) -> Tensor:
        """Return `(tokens,)` losses of float logits `(tokens, vocabulary)`."""
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        hard = cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)
        if self.by_confidence:
            hard = hard * torch.exp(-hard.detach())
        if teacher is None or not self.kd_ratio:
            return hard
        mixed = (1 - self.kd_ratio) * hard + self.kd_ratio * self.divergences(logits, teacher)
        return torch.where(teacher.known, mixed, hard)

    def losses_and_gradients(
        self, logits: Tensor, targets: Tensor, teacher: "Teacher | None", with_gradients: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return `token_losses` and their gradients by the logits, in place of which they may come."""
        if self.is_plain and (teacher is None or not self.kd_ratio):  # by hand in half of autograd's time
            logs = logits.log_softmax(-1)
            places = targets[:, None]
            losses = -logs.gather(1, places)[:, 0]
            return losses, logs.exp_().scatter_add_(1, places, logs.new_full((), -1).expand(places.shape))
        with torch.enable_grad():
            losses = self.token_losses(logits.requires_grad_(with_gradients), targets, teacher)
            gradients = torch.autograd.grad(losses.sum(), logits)[0] if with_gradients else None
        return losses.detach(), gradients

    @property
    def is_plain(self) -> bool:
        """Whether hard labels count by cross-entropy alone."""
        return not (self.label_smoothing or self.by_confidence or self.softcap)

    def divergences(self, logits: Tensor, teacher: "Teacher") -> Tensor:
        """Return `(tokens,)` divergences over the teacher's K likeliest tokens and all others as one.

        Lumping can only lower a KL, and to zero only where the K probabilities agree and so does their sum.
        """
        student = logits[:, : self.vocab_size].log_softmax(-1)
        likeliest = student.gather(1, teacher.ids)
        others = student.scatter(1, teacher.ids, float("-inf")).logsumexp(-1, keepdim=True)
        others = others.clamp(min=TAIL_FLOOR)  # as in the file; nothing may be left where K is all
        log_q = (torch.cat([likeliest, others], 1) / self.temperature).log_softmax(-1)
        log_p = (torch.cat([teacher.logprobs, teacher.tail[:, None]], 1) / self.temperature).log_softmax(-1)
        of, to = (log_p, log_q) if self.divergence == "forward_kld" else (log_q, log_p)
        return (of.exp() * (of - to)).sum(-1) * self.temperature**2


@dataclass(frozen=True)
class Teacher:
    """The teacher's distribution for each of `tokens` labels, natural logarithms in float32.

    Args:
        ids, logprobs: `(tokens, K)`, its likeliest tokens.
        tail: `(tokens,)`, the mass of all others.
        known: `(tokens,)`, False where there is none and the row means nothing.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    known: Tensor

    def __getitem__(self, part: Any) -> "Teacher":
        return Teacher(self.ids[part], self.logprobs[part], self.tail[part], self.known[part])


def summed_loss(
    hidden: Tensor,
    layer: torch.nn.Module,
    targets: Tensor,
    objective: Objective,
    teacher: Teacher | None = None,
    scale: Tensor | float = 1.0,
) -> Tensor:
    """Return `scale` times the sum of the tokens' losses.

    Args:
        hidden: `(tokens, width)`, the hidden states that predict `targets`.
        layer: the output layer; a Linear, or what an adapter makes of one.
    """
    if not isinstance(layer, torch.nn.Linear):
        return _loss_by_autograd(hidden, layer, targets, objective, teacher, scale)
    bias = getattr(layer, "bias", None)
    loss: Tensor = _ChunkedLoss.apply(hidden, layer.weight, bias, targets, objective, teacher, scale)
    return loss


def _loss_by_autograd(
    hidden: Tensor,
    layer: torch.nn.Module,
    targets: Tensor,
    objective: Objective,
    teacher: Teacher | None,
    scale: Tensor | float,
) -> Tensor:
    """Return `summed_loss` of a layer that only its own forward pass knows; each chunk runs twice for it."""

    def chunk_loss(part: slice) -> Tensor:
        logits = layer(hidden[part]).float()
        return objective.token_losses(logits, targets[part], teacher[part] if teacher else None).sum() * scale

    total = hidden[:0].float().sum()  # a zero that has a gradient
    for part in _spans(0, len(hidden), CHUNK_TOKENS):
        total = total + checkpoint(chunk_loss, part, use_reentrant=False)
    return total


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        objective: Objective,
        teacher: Teacher | None,
        scale: Tensor | float,
    ) -> Tensor:
        wanted = ctx.needs_input_grad
        total = torch.zeros((), device=hidden.device)
        grads = _Gradients(hidden, weight, bias) if any(wanted[:3]) else None
        for group in _spans(0, len(hidden), GROUP_TOKENS):
            gradients = hidden.new_empty(group.stop - group.start, len(weight)) if grads else None
            for part in _spans(group.start, group.stop, CHUNK_TOKENS):
                logits = torch.nn.functional.linear(hidden[part], weight, bias).float()
                losses, gradient = objective.losses_and_gradients(
                    logits, targets[part], teacher[part] if teacher else None, grads is not None
                )
                total += losses.sum() * scale
                if gradients is not None and gradient is not None:
                    gradients[part.start - group.start : part.stop - group.start] = gradient.mul_(scale)
            if grads and gradients is not None:
                grads.add(group, gradients, wanted)
        if grads and not len(hidden):
            grads.add_nothing(wanted)
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        given = (grads.hidden, grads.weight, grads.bias)
        return (*(g if g is None else g.mul_(grad_outputs[0]) for g in given), None, None, None, None)


class _Gradients:
    """The gradients of hidden states and output layer, added up over groups of tokens."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.inputs, self.layer, self.layer_bias = hidden, weight, bias
        self.hidden = torch.empty_like(hidden)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, group: slice, gradients: Tensor, wanted: tuple[bool, ...]) -> None:
        """Add what follows from the losses' gradients by the group's logits, `(group, vocabulary)`."""
        self.hidden[group] = gradients @ self.layer.to(gradients.dtype)
        if wanted[1]:
            product = gradients.T @ self.inputs[group]
            # In float32 where there are several: a sum over many loses what bfloat16 cannot hold
            self.weight = product if self.weight is None else self.weight.float().add_(product)
            if group.stop == len(self.inputs):
                self.weight = self.weight.to(self.layer.dtype)
        if wanted[2] and self.layer_bias is not None:
            self.bias = gradients.float().sum(0) + (0 if self.bias is None else self.bias)
            if group.stop == len(self.inputs):
                self.bias = self.bias.to(self.layer_bias.dtype)

    def add_nothing(self, wanted: tuple[bool, ...]) -> None:
        """Make gradients of zero: DDP waits for one of every weight, also where a process has no label."""
        self.weight = torch.zeros_like(self.layer) if wanted[1] else None
        self.bias = torch.zeros_like(self.layer_bias) if wanted[2] and self.layer_bias is not None else None


def _spans(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))
