"""Choosing the next token from the model's logits."""

from collections.abc import Collection, Sequence
from random import Random
from typing import Any

from distill_app.generation.answers import Sampling

Tensor = Any  # torch.Tensor; not imported here, so that this module stays light

CANDIDATES = (256, 4096)  # likeliest tokens looked at first; the whole vocabulary only where they do not do
BLOCK = 1024  # tokens compared at a time; a CPU takes many times longer over a whole row at once


class NotFinite(ValueError):
    """The logits of `row` hold NaN or infinity, so that no token can be chosen."""

    def __init__(self, row: int) -> None:
        super().__init__(f"the logits of row {row} are not finite")
        self.row = row


def choose(logits: Tensor, draws: list[Random], sampling: Sampling) -> list[int]:
    """Return one token id a row from `(rows, vocab)` logits.

    Args:
        draws: each row's own random generator, one draw a token; not used at temperature 0.

    Raises:
        NotFinite: a row holds NaN or infinity, or minus infinity alone.
    """
    import torch

    if not sampling.temperature:
        tokens = _likeliest(logits)
        _check_finite(logits.gather(-1, tokens[:, None]))  # NaN and infinity are the highest there are
        return tokens.tolist()
    probs = torch.softmax(logits.float() / sampling.temperature, -1)
    _check_finite(probs[:, :1])  # one NaN or infinity makes NaN of the whole row
    draw = torch.tensor([[d.random()] for d in draws], device=logits.device)
    draw.clamp_(max=1 - 2**-24)  # float32 rounds the largest up to 1, past the last token
    if sampling.top_p >= 1 and not sampling.top_k and not sampling.min_p:
        return _pick(probs, draw).tolist()
    tokens = torch.full((len(probs),), -1, device=logits.device)
    for count in (*CANDIDATES, probs.shape[-1]):
        left = (tokens < 0).nonzero()[:, 0]
        if not len(left):
            break
        likely, order = probs[left].topk(min(count, probs.shape[-1]), -1)
        enough = _holds_all(likely, probs.shape[-1], sampling)
        rows = left[enough]
        tokens[rows] = _from_likeliest(likely[enough], order[enough], draw[rows], sampling)
    return tokens.tolist()


def _check_finite(values: Tensor) -> None:
    """Raise NotFinite for the first row of `(rows, 1)` values that holds none."""
    finite = values[:, 0].isfinite()
    if not finite.all():
        raise NotFinite(int((~finite).nonzero()[0]))


def penalized(logits: Tensor, seen: Sequence[Collection[int]], penalty: float) -> Tensor:
    """Return `(rows, vocab)` logits in which each row's seen tokens are less likely, arXiv:1909.05858."""
    import torch

    logits = logits.clone()
    for row, ids in zip(logits, seen, strict=True):
        at = torch.tensor(sorted(set(ids)), device=logits.device)
        row[at] = torch.where(row[at] > 0, row[at] / penalty, row[at] * penalty)
    return logits


def _likeliest(logits: Tensor) -> Tensor:
    """Return the first of the highest, as `argmax(-1)` does."""
    rows, vocab = logits.shape
    if vocab % BLOCK:
        return logits.argmax(-1)
    blocks = logits.view(rows, -1, BLOCK)
    best = blocks.amax(-1).argmax(-1, keepdim=True)
    inside = blocks.gather(1, best[:, :, None].expand(-1, -1, BLOCK))[:, 0].argmax(-1)
    return best[:, 0] * BLOCK + inside


def _holds_all(likely: Tensor, vocab: int, sampling: Sampling) -> Tensor:
    """Return, a row, whether its likeliest tokens hold all that it may draw from; `likely` falls."""
    wanted = sampling.top_k or vocab
    if likely.shape[-1] >= min(wanted, vocab):
        return likely[:, 0] >= 0  # true
    if sampling.top_k:
        return likely[:, 0] < 0  # false
    return (likely.sum(-1) > sampling.top_p) | (likely[:, -1] < sampling.min_p * likely[:, 0])


def _from_likeliest(probs: Tensor, order: Tensor, draw: Tensor, sampling: Sampling) -> Tensor:
    """Return a token of the smallest set of likeliest tokens whose share reaches top_p, arXiv:1904.09751.

    `probs` and `order`, `(rows, candidates)`, come likeliest first. Of the top_k only, if any, and none
    below min_p of the likeliest, arXiv:2407.01082.
    """
    reach: Any = sampling.top_p
    if sampling.top_k:
        probs, order = probs[:, : sampling.top_k], order[:, : sampling.top_k]
        reach = sampling.top_p * probs.sum(-1, keepdim=True)
    before = probs.cumsum(-1) - probs
    left_out = (before > reach) | (probs < sampling.min_p * probs[:, :1])
    place = _pick(probs.masked_fill(left_out, 0.0), draw)
    return order.gather(-1, place[:, None])[:, 0]


def _pick(probs: Tensor, draw: Tensor) -> Tensor:
    """Return the place where the running sum of `probs` passes the share `draw`, `(rows, 1)`, of it."""
    total = probs.cumsum(-1)
    place = (total <= draw.to(total.dtype) * total[:, -1:]).sum(-1)
    return place.clamp(max=probs.shape[-1] - 1)
