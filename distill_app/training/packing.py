"""Several examples in one row without padding, and an attention that keeps each to itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

ATTENTION = "distill_packed"
FLASH = "flash_attention_2"  # knows packed rows by itself
BLOCK_TOKENS = 128
RECOMPUTED_FROM = 1024  # tokens whose attention weights are computed again for the gradient, not kept


def split_by_tokens(lengths: Sequence[int], budget: int, at_least: int = 1) -> list[list[int]]:
    """Return the places of examples in parts of at most `budget` tokens, or those of the longest example.

    Longest first into the emptiest part that has room, so that parts are few and even.

    Args:
        at_least: parts to make, where there are so many examples.
    """
    count = max(at_least, -(-sum(lengths) // budget))
    budget = max(budget, *lengths)
    while True:
        parts: list[list[int]] = [[] for _ in range(min(count, len(lengths)))]
        sizes = [0] * len(parts)
        for place in sorted(range(len(lengths)), key=lambda p: (-lengths[p], p)):
            emptiest = sizes.index(min(sizes))
            parts[emptiest].append(place)
            sizes[emptiest] += lengths[place]
        if len(parts) == len(lengths) or max(sizes) <= budget:
            return [sorted(part) for part in parts]
        count += 1


def use_packed_attention(model: Any) -> bool:
    """Give the model an attention that takes packed rows; say whether it has one.

    False for models whose layers mix tokens in other ways than full or sliding attention in transformers'
    common form: their examples go one by one.
    """
    from transformers import AttentionInterface
    from transformers.utils import is_flash_attn_2_available

    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if not model.is_backend_compatible() or kinds - {"full_attention", "sliding_attention"}:
        return False
    if model.device.type == "cuda" and model.dtype != torch.float32 and is_flash_attn_2_available():
        model.set_attn_implementation(FLASH)
    else:
        AttentionInterface.register(ATTENTION, packed_attention)
        model.set_attn_implementation(ATTENTION)
    return True


def attention_options(model: Any, lengths: Sequence[int]) -> dict[str, Any]:
    """Return what the model's forward pass needs to know of a packed row of examples so long."""
    if model.config._attn_implementation == ATTENTION:
        return {"distill_lengths": list(lengths)}
    if model.config._attn_implementation != FLASH:
        return {}
    ends = torch.tensor([0, *lengths], device=model.device).cumsum(0, dtype=torch.int32)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    distill_lengths: Sequence[int] = (),
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each example of a row; transformers' AttentionInterface.

    Args:
        query: `(1, heads, tokens, head_dim)`; key and value may have fewer heads.
        distill_lengths: tokens of each example, in order.

    Returns:
        `(1, tokens, heads, head_dim)`, and no weights.
    """
    if s_aux is not None:
        raise ValueError(f"{type(module).__name__}: its attention has sinks, which this trainer has not")
    seen = [
        _attend(q, k, v, scaling, dropout, sliding_window, softcap)
        for q, k, v in zip(
            query.split(list(distill_lengths), 2),
            key.split(list(distill_lengths), 2),
            value.split(list(distill_lengths), 2),
            strict=True,
        )
    ]
    return torch.cat(seen, 2).transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    tokens = query.shape[2]
    look = Look(query.shape[3] ** -0.5 if scaling is None else scaling, dropout, window, softcap)
    if softcap is None and query.device.type != "cpu":
        hidden = None if window is None or window >= tokens else _hidden(0, tokens, look, query.device)[1]
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if hidden is None else ~hidden,
            is_causal=hidden is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    if tokens < RECOMPUTED_FROM:
        return _attend_in_blocks(query, key, value, look)
    seen: Tensor = checkpoint(
        _attend_in_blocks, query, key, value, look, use_reentrant=False, preserve_rng_state=dropout > 0
    )
    return seen


@dataclass(frozen=True)
class Look:
    """What a token sees of those before it, and how."""

    scaling: float
    dropout: float
    window: int | None
    softcap: float | None


def _attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, look: Look) -> Tensor:
    """Two batched products for each block of queries over the keys before its end.

    On a CPU, at the lengths of a response, three times as fast as the fused kernel, forth and back.
    """
    _, heads, tokens, size = query.shape
    kv_heads = key.shape[1]
    asked = query[0] * look.scaling
    seen = []
    for start in range(0, tokens, BLOCK_TOKENS):
        end = min(start + BLOCK_TOKENS, tokens)
        first, hidden = _hidden(start, end, look, query.device)
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
        mask = mask.masked_fill_(hidden, float("-inf")).repeat(heads // kv_heads, 1)
        part = asked[:, start:end].reshape(kv_heads, -1, size)
        keys = key[0, :, first:end].transpose(1, 2)
        if look.softcap is None:
            scores = torch.baddbmm(mask, part, keys)
        else:
            scores = torch.tanh(torch.bmm(part, keys) / look.softcap) * look.softcap + mask
        weights = torch.softmax(scores, -1)  # a CPU sums in float32 whatever the type
        if look.dropout:
            weights = torch.nn.functional.dropout(weights, look.dropout)
        seen.append(torch.bmm(weights, value[0, :, first:end]).view(1, heads, end - start, size))
    return torch.cat(seen, 2)


def _hidden(start: int, end: int, look: Look, device: torch.device) -> tuple[int, Tensor]:
    """Return the first key that queries from `start` to `end` may see, and of the keys from there to `end`
    those that each may not, `(queries, keys)`."""
    first = 0 if look.window is None else max(0, start - look.window + 1)
    ages = torch.arange(start, end, device=device)[:, None] - torch.arange(first, end, device=device)
    return first, ages < 0 if look.window is None else (ages < 0) | (ages >= look.window)
