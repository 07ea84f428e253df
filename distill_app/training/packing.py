"""Several examples in one row without padding, and an attention that keeps each to itself."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

ATTENTION = "distill_packed"
FLASH = "flash_attention_2"  # knows packed rows by itself


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
    hidden = None
    if window is not None and window < tokens:
        ages = torch.arange(tokens, device=query.device)
        ages = ages[:, None] - ages
        hidden = (ages < 0) | (ages >= window)
    if softcap is None and query.device.type != "cpu":
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
    # The weights, `(heads, tokens, tokens)`, are computed again for the gradient rather than kept
    seen: Tensor = checkpoint(
        _plain_attention,
        *(query, key, value, scaling, dropout, hidden, softcap),
        use_reentrant=False,
        preserve_rng_state=dropout > 0,
    )
    return seen


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    hidden: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Two batched products: on a CPU, at the lengths of a response, twice the fused kernel's speed."""
    _, heads, tokens, size = query.shape
    kv_heads = key.shape[1]
    if hidden is None:
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu_(1)
    asked = query.reshape(kv_heads, -1, size) * (size**-0.5 if scaling is None else scaling)
    scores = torch.bmm(asked, key[0].transpose(1, 2)).view(heads, tokens, tokens)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(hidden, float("-inf"))
    weights = torch.softmax(scores, -1)  # a CPU sums in float32 whatever the type
    weights = torch.nn.functional.dropout(weights, dropout, training=dropout > 0)
    return torch.bmm(weights.view(kv_heads, -1, tokens), value[0]).view(1, heads, tokens, size)
