"""The keys and values of the rows that run, and the attention over them.

A row's tokens lie from the start of its slot, and the slot's width follows from the row's own length: so
what a row sums up comes in the same order wherever it lies and whoever runs beside it, and a long row costs
the others neither memory nor time. Together with matrix products whose rows do not depend on each other this
makes an answer a function of its prompt alone. Measured to the bit: torch 2.13's bfloat16 products on a CPU
are such, for two rows or more and above 4096 multiplications, and its fused attention, whatever the number of
threads.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from distill_app.core.models import Model

Tensor = Any  # torch.Tensor; not imported here, so that this module stays light

NAME = "distill_slots"  # under which transformers finds this attention, and passes the slots to it
WIDTH_STEP = 64  # tokens by which short slots differ; long ones by a quarter of a power of two
GROWTH = 1.25  # of a pool that is full, so that it is not copied for every row that comes
SPARSE = 0.6  # slots are given up when fewer than this share of a pool is taken
FUSED_FROM = 512  # tokens of prompt and head: below, plain products are as fast and take little memory
QUERIES = 512  # of a prompt at a time, where a mask is needed; the fused kernel takes as many keys at a time


def width_for(length: int) -> int:
    """Return the width of the slot of a row of so many tokens, above 256 at most 1.25 times as many."""
    step = max(WIDTH_STEP, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


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
    """A prompt among the packed tokens: its row, its first packed place, its length.

    `shared` tokens of the common head lie in front of it.
    """

    row: int
    first: int
    length: int
    shared: int


@dataclass(frozen=True)
class _Running:
    """The rows of one pool that go on in a pass, one token each.

    Args:
        width: of the pool.
        first: the place of their first token among the packed ones.
        slots: `(running,)` in the pool, and `places` of their new tokens in them.
        lengths: `(slots, 1, 1)` tokens of each slot, the new one of a running row included.
        visible: `(slots, 1, width)` float32, 0 where a running row may look, else minus infinity.
    """

    width: int
    first: int
    slots: Tensor
    places: Tensor
    lengths: Tensor
    visible: Tensor

    def within(self, window: int | None) -> Tensor:
        """Return `visible`, for layers that look back over no more than `window` tokens."""
        import torch

        if window is None:
            return self.visible
        places = torch.arange(self.visible.shape[-1], device=self.visible.device)
        return self.visible.masked_fill(places < self.lengths - window, float("-inf"))

    def on(self, device: Any) -> "_Running":
        tensors = (self.slots, self.places, self.lengths, self.visible)
        return _Running(self.width, self.first, *(tensor.to(device) for tensor in tensors))


@dataclass
class _Pool:
    """Slots of one width: whose each is; each layer's keys and values, `(slots, kv_heads, width, size)`."""

    width: int
    rows: list[int | None] = field(default_factory=list)
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def taken(self) -> int:
        return len(self.rows) - self.rows.count(None)

    def of_layer(self, layer: int, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values; `key` is `(tokens, kv_heads, size)`."""
        if layer not in self.layers:
            shape = (len(self.rows), key.shape[1], self.width, key.shape[2])
            self.layers[layer] = (key.new_zeros(shape), key.new_zeros(shape))
        return self.layers[layer]

    def make_room(self, count: int) -> None:
        """Have at least so many free slots."""
        lacking = count - self.rows.count(None)
        if lacking > 0:
            size = max(len(self.rows) + lacking, int(GROWTH * len(self.rows)))
            self._resize(list(range(len(self.rows))), size)

    def shrink(self) -> None:
        """Give up the free slots."""
        self._resize([slot for slot, row in enumerate(self.rows) if row is not None], self.taken)

    def _resize(self, keep: list[int], size: int) -> None:
        for layer, both in self.layers.items():
            self.layers[layer] = (_resized(both[0], keep, size), _resized(both[1], keep, size))
        self.rows = [self.rows[slot] for slot in keep] + [None] * (size - len(keep))

    def take_over(self, source: "_Pool", rows: Sequence[int]) -> None:
        """Copy what another pool holds of rows that have a slot in both."""
        width = min(self.width, source.width)
        here, there = [self.rows.index(row) for row in rows], [source.rows.index(row) for row in rows]
        for layer, both in source.layers.items():
            own = self.of_layer(layer, both[0][:, :, 0])
            for new, old in zip(own, both, strict=True):
                new[here, :, :width] = old[there, :, :width]


class Slots:
    """The keys and values of all rows, each in a slot as wide as its length needs."""

    def __init__(self) -> None:
        self._pools: dict[int, _Pool] = {}  # by width
        self._running: dict[Any, list[_Running]] = {}  # by device: a large model's layers lie on several
        self._entering: list[Entering] = []
        self._head: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def tokens(self) -> int:
        """How many tokens there is room for."""
        return sum(pool.width * len(pool.rows) for pool in self._pools.values())

    def arrange(self, lengths: Mapping[int, int]) -> None:
        """Give each row, by its number, a slot for so many tokens; rows that are not named lose theirs."""
        import torch

        with torch.inference_mode():  # in which a pass makes pools too; outside, none of those can be written
            self._arrange(lengths)

    def _arrange(self, lengths: Mapping[int, int]) -> None:
        widths = {row: width_for(length) for row, length in lengths.items()}
        for pool in self._pools.values():
            pool.rows = [row if row in widths else None for row in pool.rows]
        homes = {row: pool for pool in self._pools.values() for row in pool.rows if row is not None}
        arriving: dict[int, list[int]] = {}
        for row, width in widths.items():
            if row not in homes or homes[row].width != width:
                arriving.setdefault(width, []).append(row)
        for width, rows in arriving.items():
            pool = self._pools.setdefault(width, _Pool(width))
            pool.make_room(len(rows))
            free = (slot for slot, row in enumerate(pool.rows) if row is None)
            for row, slot in zip(rows, list(free), strict=False):
                pool.rows[slot] = row
            for source in {homes[row].width: homes[row] for row in rows if row in homes}.values():
                moved = [row for row in rows if homes.get(row) is source]
                pool.take_over(source, moved)
                source.rows = [None if row in moved else row for row in source.rows]
        self._pools = {width: pool for width, pool in sorted(self._pools.items()) if pool.taken}
        for pool in self._pools.values():
            if pool.taken < SPARSE * len(pool.rows):
                pool.shrink()

    def in_order(self, rows: Sequence[int]) -> list[int]:
        """Return rows in the order in which a pass takes them: by pool, then by slot."""
        wanted = set(rows)
        return [
            row for pool in self._pools.values() for row in pool.rows if row is not None and row in wanted
        ]

    def keep_as_head(self, row: int, length: int) -> None:
        """Take the first tokens of a row as the head that later prompts share."""
        pool, slot = self._seat(row)
        for layer, (keys, values) in pool.layers.items():
            self._head[layer] = (keys[slot, :, :length].clone(), values[slot, :, :length].clone())

    def pack(self, going: Mapping[int, int], entering: list[Entering]) -> None:
        """Say what the next pass holds: one token of each row that goes on, then whole prompts.

        Args:
            going: how many tokens each row has, the new one included, as `in_order` gives them.
        """
        import torch

        running, first = [], 0
        for pool in self._pools.values():
            slots = [slot for slot, row in enumerate(pool.rows) if row in going]
            if not slots:
                continue
            lengths = torch.ones(len(pool.rows), dtype=torch.long)
            for slot in slots:
                lengths[slot] = going[pool.rows[slot]]  # type: ignore[index]
            at = torch.tensor(slots, dtype=torch.long)
            places, lengths = lengths[at] - 1, lengths[:, None, None]
            hidden = torch.arange(pool.width) >= lengths
            visible = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
            running.append(_Running(pool.width, first, at, places, lengths, visible))
            first += len(slots)
        self._running = {torch.device("cpu"): running}
        self._entering = entering

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, look: Look) -> Tensor:
        """Store the packed tokens' keys and values; return what their queries see.

        Shapes: query `(1, heads, tokens, head_dim)`, key and value `(1, kv_heads, tokens, head_dim)`,
        the outcome `(1, tokens, heads, head_dim)`.
        """
        import torch

        groups = query.shape[1] // key.shape[1]
        query = query[0].unflatten(0, (key.shape[1], groups))  # (kv_heads, groups, tokens, head_dim)
        key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)  # (tokens, kv_heads, head_dim)
        parts = []
        for some in self._running_on(key.device):
            keys, values = self._pools[some.width].of_layer(layer, key)
            packed = slice(some.first, some.first + len(some.slots))
            at = (some.slots, slice(None), some.places)
            keys[at], values[at] = key[packed], value[packed]
            parts.append(_attend_running(query[:, :, packed].permute(2, 0, 1, 3), keys, values, some, look))
        for row in self._entering:
            end, packed = row.shared + row.length, slice(row.first, row.first + row.length)
            pool, slot = self._seat(row.row)
            keys, values = (all_[slot, :, :end] for all_ in pool.of_layer(layer, key))
            if row.shared:
                keys[:, : row.shared], values[:, : row.shared] = self._head[layer]
            keys[:, row.shared :] = key[packed].transpose(0, 1)
            values[:, row.shared :] = value[packed].transpose(0, 1)
            parts.append(_attend_prompt(query[:, :, packed], keys, values, look))
        unused = key[: len(key) - sum(map(len, parts))]  # the engine packs an even number of tokens
        parts.append(query.new_zeros(len(unused), *parts[0].shape[1:]))
        return torch.cat(parts).flatten(1, 2)[None]

    def _running_on(self, device: Any) -> list[_Running]:
        if device not in self._running:
            known = next(iter(self._running.values()))
            self._running[device] = [some.on(device) for some in known]
        return self._running[device]

    def _seat(self, row: int) -> tuple[_Pool, int]:
        pool = next(pool for pool in self._pools.values() if row in pool.rows)
        return pool, pool.rows.index(row)


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


def _attend_running(query: Tensor, keys: Tensor, values: Tensor, some: _Running, look: Look) -> Tensor:
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
        asked[some.slots] = query
    scores = torch.bmm(asked.reshape(slots * kv_heads, -1, size), keys.view(-1, width, size).transpose(1, 2))
    scores = look.scaled(scores.view(slots, -1, width), some.within(look.window))
    weights = torch.softmax(scores, -1).to(values.dtype).view(slots * kv_heads, -1, width)
    seen = torch.bmm(weights, values.view(-1, width, size)).view(asked.shape)
    return seen if everyone else seen[some.slots]


def _attend_prompt(query: Tensor, keys: Tensor, values: Tensor, look: Look) -> Tensor:
    """Return `(tokens, kv_heads, groups, head_dim)` from query `(kv_heads, groups, tokens, head_dim)`.

    The queries are those of the last tokens. How it is computed depends on the prompt's length alone, its
    shared head included. Beyond `FUSED_FROM` memory grows with the length, not with its square.
    """
    import torch

    tokens, width = query.shape[2], keys.shape[1]
    if width < FUSED_FROM:
        return _attend_plainly(query, keys, values, look)
    if look.softcap is None and look.window is None and tokens == width:
        return _attend_fused(query, keys, values, look)
    attend = _attend_masked if look.softcap is None else _attend_plainly
    parts, start = [], width - tokens
    while start < width:
        # Parts end at the same places, and none has one query alone: a kernel's rounding depends on both
        end = min(start - start % QUERIES + QUERIES, width)
        some = query[:, :, start - width + tokens :][:, :, : end - start]
        paired = torch.cat([some, some], 2) if end - start == 1 else some
        parts.append(attend(paired, keys[:, :end], values[:, :end], look)[start - end :])
        start = end
    return torch.cat(parts)


def _seen_keys(query: Tensor, keys: Tensor, look: Look) -> Tensor:
    """Return `(tokens, width)`, whether each of the last tokens looks at each key."""
    import torch

    tokens, width = query.shape[2], keys.shape[1]
    places = torch.arange(width, device=keys.device)
    ages = places[width - tokens :, None] - places
    return ages >= 0 if look.window is None else (ages >= 0) & (ages < look.window)


def _attend_plainly(query: Tensor, keys: Tensor, values: Tensor, look: Look) -> Tensor:
    import torch

    kv_heads, groups, tokens, size = query.shape
    width = keys.shape[1]
    scores = torch.bmm(query.reshape(kv_heads, groups * tokens, size), keys.transpose(1, 2))
    hidden = ~_seen_keys(query, keys, look)
    visible = torch.zeros(tokens, width, device=keys.device).masked_fill_(hidden, float("-inf"))
    scores = look.scaled(scores.view(kv_heads, groups, tokens, width), visible)
    weights = torch.softmax(scores, -1).to(values.dtype)
    seen = torch.bmm(weights.view(kv_heads, groups * tokens, width), values)
    return seen.view(kv_heads, groups, tokens, size).permute(2, 0, 1, 3)


def _attend_masked(query: Tensor, keys: Tensor, values: Tensor, look: Look) -> Tensor:
    return _attend_fused(query, keys, values, look, _seen_keys(query, keys, look))


def _attend_fused(
    query: Tensor, keys: Tensor, values: Tensor, look: Look, seen_keys: Tensor | None = None
) -> Tensor:
    """Attend by torch's fused kernel; without `seen_keys` each token looks at itself and all before it."""
    from torch.nn.functional import scaled_dot_product_attention

    seen = scaled_dot_product_attention(
        query.flatten(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=seen_keys,
        is_causal=seen_keys is None,
        scale=look.scaling,
        enable_gqa=query.shape[1] > 1,
    )
    return seen[0].unflatten(0, query.shape[:2]).permute(2, 0, 1, 3)


def _resized(tensor: Tensor, keep: list[int], size: int) -> Tensor:
    """Return the chosen slots, in that order, and empty ones behind them up to `size`."""
    new = tensor.new_zeros(size, *tensor.shape[1:])
    new[: len(keep)] = tensor[keep]
    return new
