"""The keys and values of a running batch, and the attention over them.

Every row has a slot, its tokens at the slot's start, so what a row sums up comes in the same order wherever
the row lies and whoever runs beside it. Together with matrix products whose rows do not depend on each other
this makes an answer a function of its prompt alone. Measured to the bit: torch 2.13's bfloat16 products on a
CPU are such, for two rows or more and above 4096 multiplications, whatever the number of threads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distill_app.core.models import Model

Tensor = Any  # torch.Tensor; not imported here, so that this module stays light

NAME = "distill_slots"  # under which transformers finds this attention, and passes the slots to it
WIDTH_STEP = 64  # tokens by which the slots grow and shrink; each change is a copy


@dataclass(frozen=True)
class Look:
    """How a layer's attention looks: scaling, how many tokens back, and the cap of its scores if any."""

    scaling: float
    window: int | None = None
    softcap: float | None = None

    def scaled(self, scores: Tensor, visible: Tensor) -> Tensor:
        """Return float32 scores with minus infinity where there is nothing to see."""
        import torch

        if self.softcap is None:
            return torch.add(visible, scores, alpha=self.scaling)
        return torch.tanh(scores.float() * (self.scaling / self.softcap)) * self.softcap + visible


@dataclass(frozen=True)
class Entering:
    """A prompt among the packed tokens: the slot it goes into, its first packed place, its length.

    `shared` tokens of the common head lie in front of it.
    """

    slot: int
    first: int
    length: int
    shared: int


@dataclass(frozen=True)
class Packed:
    """What one forward pass holds: one token of each running row, then whole prompts.

    Args:
        running: `(running,)` slots of the rows that go on, and `places` of their new tokens in them.
        lengths: `(slots, 1, 1)` tokens of each slot, the new one of a running row included.
        visible: `(slots, 1, width)` float32, 0 where a running row may look, else minus infinity.
    """

    running: Tensor
    places: Tensor
    lengths: Tensor
    visible: Tensor
    entering: list[Entering]

    def within(self, window: int | None) -> Tensor:
        """Return `visible`, for layers that look back over no more than `window` tokens."""
        import torch

        if window is None:
            return self.visible
        places = torch.arange(self.visible.shape[-1], device=self.visible.device)
        return self.visible.masked_fill(places < self.lengths - window, float("-inf"))

    def on(self, device: Any) -> "Packed":
        tensors = (self.running, self.places, self.lengths, self.visible)
        running, places, lengths, visible = (tensor.to(device) for tensor in tensors)
        return Packed(running, places, lengths, visible, self.entering)


class Slots:
    """Keys and values of every layer, `(slots, kv_heads, width, head_dim)`."""

    def __init__(self, count: int) -> None:
        self.count, self.width = count, 0
        self._packed: dict[Any, Packed] = {}  # by device: a large model's layers lie on several
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._head: dict[int, tuple[Tensor, Tensor]] = {}

    def fit(self, width: int, keep: list[int] | None = None) -> None:
        """Make room for `width` tokens a slot; with `keep`, keep those slots alone, in that order."""
        wanted = -(-width // WIDTH_STEP) * WIDTH_STEP
        if keep is None and self.width - WIDTH_STEP <= wanted <= self.width:
            return
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = (_resized(keys, wanted, keep), _resized(values, wanted, keep))
        self.count = self.count if keep is None else len(keep)
        self.width = wanted

    def keep_as_head(self, slot: int, length: int) -> None:
        """Take the first tokens of a slot as the head that later prompts share."""
        for layer, (keys, values) in self._layers.items():
            self._head[layer] = (keys[slot, :, :length].clone(), values[slot, :, :length].clone())

    def pack(self, running: Tensor, lengths: Tensor, entering: list[Entering]) -> None:
        """Say what the next pass holds; `running` slots and `(slots,)` lengths as in `Packed`."""
        import torch

        places, lengths = lengths[running] - 1, lengths[:, None, None]
        hidden = torch.arange(self.width) >= lengths
        visible = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        self._packed = {running.device: Packed(running, places, lengths, visible, entering)}

    def _packed_on(self, device: Any) -> Packed:
        if device not in self._packed:
            self._packed[device] = next(iter(self._packed.values())).on(device)
        return self._packed[device]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, look: Look) -> Tensor:
        """Store the packed tokens' keys and values; return what their queries see.

        Shapes: query `(1, heads, tokens, head_dim)`, key and value `(1, kv_heads, tokens, head_dim)`,
        the outcome `(1, tokens, heads, head_dim)`.
        """
        import torch

        packed, groups = self._packed_on(key.device), query.shape[1] // key.shape[1]
        query = query[0].unflatten(0, (key.shape[1], groups))  # (kv_heads, groups, tokens, head_dim)
        key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)  # (tokens, kv_heads, head_dim)
        if layer not in self._layers:
            shape = (self.count, key.shape[1], self.width, key.shape[2])
            self._layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self._layers[layer]
        parts = []
        running = len(packed.running)
        if running:
            at = (packed.running, slice(None), packed.places)
            keys[at], values[at] = key[:running], value[:running]
            one = query[:, :, :running].permute(2, 0, 1, 3)
            parts.append(_attend_running(one, keys, values, packed, look))
        for row in packed.entering:
            end, places = row.shared + row.length, slice(row.first, row.first + row.length)
            own_keys, own_values = keys[row.slot, :, :end], values[row.slot, :, :end]
            if row.shared:
                own_keys[:, : row.shared], own_values[:, : row.shared] = self._head[layer]
            own_keys[:, row.shared :] = key[places].transpose(0, 1)
            own_values[:, row.shared :] = value[places].transpose(0, 1)
            parts.append(_attend_prompt(query[:, :, places], own_keys, own_values, look))
        unused = key[: len(key) - sum(map(len, parts))]  # the engine packs an even number of tokens
        parts.append(query.new_zeros(len(unused), *parts[0].shape[1:]))
        return torch.cat(parts).flatten(1, 2)[None]


@contextmanager
def own_attention(model: Model) -> Iterator[None]:
    """Let a model attend over the slots that its forward pass is given as `distill_slots`.

    Source: transformers' AttentionInterface, made for serving engines.

    Raises:
        ValueError: the model's layers do not take an attention from outside.
    """
    from transformers import AttentionInterface

    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if not model.is_backend_compatible() or kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{type(model).__name__}: found layers of {', '.join(sorted(kinds))}, expected full or sliding"
            " attention in transformers' common form; as a teacher it runs with label.engine: vllm or openai"
        )
    AttentionInterface.register(NAME, _attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    distill_slots: Slots | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if distill_slots is None or s_aux is not None:
        raise ValueError(
            f"{type(module).__name__}: its attention has sinks, which this engine has not; as a teacher the"
            " model runs with label.engine: vllm or openai"
        )
    look = Look(scaling, sliding_window, softcap)
    return distill_slots.attend(module.layer_idx, query, key, value, look), None


def _attend_running(query: Tensor, keys: Tensor, values: Tensor, packed: Packed, look: Look) -> Tensor:
    """Return `(running, kv_heads, groups, head_dim)` from a query of that shape.

    Two plain batched products over the slots as they lie: fused attention is several times slower on a
    CPU where a row asks with one token.
    """
    import torch

    slots, kv_heads, width, size = keys.shape
    everyone = len(query) == slots
    asked = query
    if not everyone:
        asked = query.new_zeros(slots, *query.shape[1:])
        asked[packed.running] = query
    scores = torch.bmm(asked.reshape(slots * kv_heads, -1, size), keys.view(-1, width, size).transpose(1, 2))
    scores = look.scaled(scores.view(slots, -1, width), packed.within(look.window))
    weights = torch.softmax(scores, -1).to(values.dtype).view(slots * kv_heads, -1, width)
    seen = torch.bmm(weights, values.view(-1, width, size)).view(asked.shape)
    return seen if everyone else seen[packed.running]


def _attend_prompt(query: Tensor, keys: Tensor, values: Tensor, look: Look) -> Tensor:
    """Return `(tokens, kv_heads, groups, head_dim)` from query `(kv_heads, groups, tokens, head_dim)`."""
    import torch

    kv_heads, groups, tokens, size = query.shape
    width = keys.shape[1]
    scores = torch.bmm(query.reshape(kv_heads, groups * tokens, size), keys.transpose(1, 2))
    ages = torch.arange(width - tokens, width, device=keys.device)[:, None] - torch.arange(
        width, device=keys.device
    )
    hidden = ages < 0 if look.window is None else (ages < 0) | (ages >= look.window)
    visible = torch.zeros(tokens, width, device=keys.device).masked_fill_(hidden, float("-inf"))
    scores = look.scaled(scores.view(kv_heads, groups, tokens, width), visible)
    weights = torch.softmax(scores, -1).to(values.dtype)
    seen = torch.bmm(weights.view(kv_heads, groups * tokens, width), values)
    return seen.view(kv_heads, groups, tokens, size).permute(2, 0, 1, 3)


def _resized(tensor: Tensor, width: int, keep: list[int] | None) -> Tensor:
    import torch

    count = len(tensor) if keep is None else len(keep)
    new = tensor.new_zeros(count, tensor.shape[1], width, tensor.shape[3])
    cut = min(width, tensor.shape[2])
    rows = slice(None) if keep is None else torch.tensor(keep, device=tensor.device)
    new[:, :, :cut] = tensor[rows, :, :cut]
    return new
