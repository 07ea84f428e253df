"""Several examples in one row without padding, and an attention that keeps each to itself.

On a GPU that is torch's own variable-length attention, or where it does not fit flash-attention, or
transformers' block-diagonal masks; on a CPU, plain products in blocks and, for long examples, torch's fused
kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

BLOCKS = "distill_blocks"  # our names of attentions, and transformers' own, which know packed rows
VARLEN = "distill_varlen"
FLASH = "flash_attention_2"
MASKED = "sdpa"
BLOCK_TOKENS = 128
LONG = 1024  # tokens of an example from which the fused kernel is as fast as blocks on a CPU, and smaller
FLASH_CAPABILITY = (8, 0)  # of a GPU that torch's flash kernels run on: Ampere and newer
FLASH_HEADS = 256  # widest head that they take; widths are multiples of 8


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


def use_packed_attention(model: Any, device: torch.device, in_half: bool) -> bool:
    """Give the model an attention that takes packed rows; say whether it has one.

    False for models whose layers mix tokens in other ways than full or sliding attention in transformers'
    common form: their examples go one by one.

    Args:
        device: where the model will run; it need not lie there yet.
        in_half: queries and keys come in 16 bits, by the weights' type or by autocast.
    """
    from transformers import AttentionInterface

    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if not model.is_backend_compatible() or kinds - {"full_attention", "sliding_attention"}:
        return False
    AttentionInterface.register(BLOCKS, attend_in_blocks)
    AttentionInterface.register(VARLEN, attend_varlen)
    model.set_attn_implementation(choose_attention(model.config, device, in_half))
    return True


def choose_attention(config: Any, device: torch.device, in_half: bool) -> str:
    """Return the name of the attention that is the fastest for packed rows on a device."""
    from transformers.utils import is_flash_attn_2_available

    if device.type != "cuda":
        return BLOCKS
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    has_flash = in_half and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
    fits_varlen = not is_capped and not getattr(config, "attention_dropout", 0.0) and size % 8 == 0
    if has_flash and fits_varlen and size <= FLASH_HEADS:
        return VARLEN
    if has_flash and is_flash_attn_2_available():
        return FLASH
    return BLOCKS if is_capped else MASKED  # torch's fused attention does not know a cap


def attention_options(model: Any, lengths: Sequence[int]) -> dict[str, Any]:
    """Return what the model's forward pass needs to know of a packed row of examples so long."""
    if model.config._attn_implementation == BLOCKS:
        return {"distill_lengths": list(lengths)}
    if model.config._attn_implementation not in (VARLEN, FLASH):
        return {}  # transformers finds the examples by their positions
    ends = ends_of(lengths, model.device)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def ends_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return `(examples + 1,)` int32: where each example of a row begins, and the row's end."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)


def attend_varlen(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each example of a row by torch's flash kernels; transformers' AttentionInterface.

    Args:
        query: `(1, heads, tokens, head_dim)`; key and value may have fewer heads.
        cu_seq_lens_q: `(examples + 1,)` int32, where each example begins, and the row's end.
        max_length_q: tokens of the longest example.

    Returns:
        `(1, tokens, heads, head_dim)`, and no weights.
    """
    from torch.nn.attention.varlen import varlen_attn

    _refuse_sinks(module, s_aux)
    # Under autocast the rotation leaves float32 behind, which flash kernels do not take
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    assert cu_seq_lens_q is not None
    q, k, v = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    seen: Any = varlen_attn(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return seen[None], None


def attend_in_blocks(
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
    _refuse_sinks(module, s_aux)
    look = Look(query.shape[3] ** -0.5 if scaling is None else scaling, dropout, sliding_window, softcap)
    seen = [
        _attend(q, k, v, look)
        for q, k, v in zip(
            query.split(list(distill_lengths), 2),
            key.split(list(distill_lengths), 2),
            value.split(list(distill_lengths), 2),
            strict=True,
        )
    ]
    return torch.cat(seen, 2).transpose(1, 2).contiguous(), None


def _refuse_sinks(module: Any, s_aux: Tensor | None) -> None:
    if s_aux is not None:
        raise ValueError(f"{type(module).__name__}: its attention has sinks, which this trainer has not")


@dataclass(frozen=True)
class Look:
    """What a token sees of those before it, and how."""

    scaling: float
    dropout: float
    window: int | None
    softcap: float | None

    def is_plain(self, tokens: int) -> bool:
        """Whether in an example so long a token simply sees all that come before it."""
        sees_all = self.window is None or self.window >= tokens
        return sees_all and self.softcap is None and not self.dropout


def _attend(query: Tensor, key: Tensor, value: Tensor, look: Look) -> Tensor:
    """Return what one example's queries see, `(1, heads, tokens, head_dim)`.

    Two batched products for each block of queries over the keys before its end: on a CPU, at the lengths of
    a response, three times as fast as the fused kernel, forward and backward. Their weights, quadratic in the
    length, are kept for the gradient only where an example is short.
    """
    tokens = query.shape[2]
    if tokens >= LONG and look.is_plain(tokens):
        return scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=look.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    seen = []
    for start in range(0, tokens, BLOCK_TOKENS):
        block = (query, key, value, start, min(start + BLOCK_TOKENS, tokens), look)
        if tokens < LONG:
            seen.append(_attend_block(*block))
        else:
            keeps_random_state = look.dropout > 0
            seen.append(
                checkpoint(_attend_block, *block, use_reentrant=False, preserve_rng_state=keeps_random_state)
            )
    return torch.cat(seen, 2)


def _attend_block(query: Tensor, key: Tensor, value: Tensor, start: int, end: int, look: Look) -> Tensor:
    """Return what the queries from `start` to `end` see, `(1, heads, end - start, head_dim)`."""
    heads, kv_heads, size = query.shape[1], key.shape[1], query.shape[3]
    first, hidden = _hidden(start, end, look, query.device)
    mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
    mask = mask.masked_fill_(hidden, float("-inf")).repeat(heads // kv_heads, 1)
    asked = (query[0, :, start:end] * look.scaling).reshape(kv_heads, -1, size)
    keys = key[0, :, first:end].transpose(1, 2)
    if look.softcap is None:
        scores = torch.baddbmm(mask, asked, keys)
    else:
        scores = torch.tanh(torch.bmm(asked, keys) / look.softcap) * look.softcap + mask
    weights = torch.softmax(scores, -1)  # a CPU sums in float32 whatever the type
    if look.dropout:
        weights = torch.nn.functional.dropout(weights, look.dropout)
    return torch.bmm(weights, value[0, :, first:end]).view(1, heads, end - start, size)


def _hidden(start: int, end: int, look: Look, device: torch.device) -> tuple[int, Tensor]:
    """Return the first key that queries from `start` to `end` may see, and of the keys from there to `end`
    those that each may not, `(queries, keys)`."""
    first = 0 if look.window is None else max(0, start - look.window + 1)
    ages = torch.arange(start, end, device=device)[:, None] - torch.arange(first, end, device=device)
    return first, ages < 0 if look.window is None else (ages < 0) | (ages >= look.window)
