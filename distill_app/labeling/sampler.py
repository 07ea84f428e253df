"""Choosing the next token from the model's scores."""

from random import Random
from typing import Any

from distill_app.labeling.answers import Sampling

Tensor = Any  # torch.Tensor; not imported here, so that this module stays light

CANDIDATES = (256, 4096)  # likeliest tokens looked at first; the whole vocabulary only where they do not do
BLOCK = 1024  # tokens compared at a time; a CPU takes many times longer over a whole row at once


def choose(logits: Tensor, draws: list[Random], sampling: Sampling) -> list[int]:
    """Return one token id a row from `(rows, vocab)` logits.

    Args:
        draws: each row's own random generator, one draw a token; not used at temperature 0.
    """
    import torch

    if not sampling.temperature:
        return _likeliest(logits).tolist()
    probs = torch.softmax(logits.float() / sampling.temperature, -1)
    draw = torch.tensor([[d.random()] for d in draws], device=logits.device)
    draw.clamp_(max=1 - 2**-24)  # float32 rounds the largest up to 1, past the last token
    if sampling.top_p >= 1:
        return _pick(probs, draw).tolist()
    tokens = torch.full((len(probs),), -1, device=logits.device)
    for count in (*CANDIDATES, probs.shape[-1]):
        left = (tokens < 0).nonzero()[:, 0]
        if not len(left):
            break
        likely, order = probs[left].topk(min(count, probs.shape[-1]), -1)
        enough = (likely.sum(-1) > sampling.top_p) | (count >= probs.shape[-1])
        rows = left[enough]
        tokens[rows] = _from_nucleus(likely[enough], order[enough], draw[rows], sampling.top_p)
    return tokens.tolist()


def _likeliest(logits: Tensor) -> Tensor:
    """Return the first of the highest, as `argmax(-1)` does."""
    rows, vocab = logits.shape
    if vocab % BLOCK:
        return logits.argmax(-1)
    blocks = logits.view(rows, -1, BLOCK)
    best = blocks.amax(-1).argmax(-1, keepdim=True)
    inside = blocks.gather(1, best[:, :, None].expand(-1, -1, BLOCK))[:, 0].argmax(-1)
    return best[:, 0] * BLOCK + inside


def _from_nucleus(probs: Tensor, order: Tensor, draw: Tensor, top_p: float) -> Tensor:
    """Return a token of the smallest set of likeliest tokens whose share reaches top_p, arXiv:1904.09751.

    `probs` and `order`, `(rows, candidates)`, come likeliest first.
    """
    before = probs.cumsum(-1) - probs
    place = _pick(probs.masked_fill(before > top_p, 0.0), draw)
    return order.gather(-1, place[:, None])[:, 0]


def _pick(probs: Tensor, draw: Tensor) -> Tensor:
    """Return the place where the running sum of `probs` passes the share `draw`, `(rows, 1)`, of it."""
    total = probs.cumsum(-1)
    place = (total <= draw.to(total.dtype) * total[:, -1:]).sum(-1)
    return place.clamp(max=probs.shape[-1] - 1)
