"""The in-process engine: prompts in, answers with token counts and finish reasons out.

Rows run side by side in slots (`slots.py`). One forward pass holds one token of every running row and the
whole prompt of every row that enters, without padding; a row that ends leaves its slot to the next prompt.
Continuous batching: Yu et al., Orca, OSDI 2022.
"""

import heapq
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from random import Random
from typing import Any

from distill_app.core.errors import EngineGone
from distill_app.core.models import Model, Tokenizer
from distill_app.labeling.answers import Answer, FinishReason, Sampling, seed_of
from distill_app.labeling.memory import is_out_of_memory, release_memory, rows_that_fit
from distill_app.labeling.packing import packed_weights
from distill_app.labeling.sampler import choose
from distill_app.labeling.slots import Entering, Slots, own_attention

REVISION = 1  # part of an answer's key: raise it with any change here or beside that may flip a token
PROMPT_TOKENS = 2048  # of entering prompts in one pass; more would only take memory
LOOK_AHEAD = 4  # batches of prompts read before their turn, to run those of like length side by side
HEAD_MIN = 8  # shared tokens worth computing once
PACK_FROM = 24  # prompts for which it pays to copy the weights into the CPU's own layout
SPARSE = 0.6  # slots are given up when fewer than this share runs and no prompt waits


@dataclass
class _Row:
    """One prompt on its way; `out` holds its answer's tokens so far."""

    place: int
    ids: list[int]
    seed: int
    out: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.draw = Random(self.seed)

    @property
    def length(self) -> int:
        return len(self.ids) + len(self.out)

    def __lt__(self, other: "_Row") -> bool:
        return (-len(self.ids), self.place) < (-len(other.ids), other.place)


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    batch_size: int = 64,
) -> list[Answer]:
    """Return one answer for each prompt, in the order of the prompts; see `stream_answers`."""
    answers = dict(stream_answers(model, tokenizer, prompts, sampling, batch_size))
    return [answers[place] for place in range(len(prompts))]


def stream_answers(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Iterable[str],
    sampling: Sampling,
    batch_size: int = 64,
) -> Iterator[tuple[int, Answer]]:
    """Yield the place of each prompt and its answer, as soon as it is ready.

    Prompts are read a few batches ahead and enter longest first. Each draws from a random generator of its
    own, seeded by the prompt and the seed. In bfloat16 on a CPU an answer does not depend on the others.
    When memory runs out, the batch is halved and its unfinished rows begin again.

    Args:
        batch_size: rows that run at a time, at most; fewer where memory is short.

    Raises:
        ValueError: the model's attention is of a kind that this engine cannot run.
        EngineGone: memory does not suffice for a single row.
    """
    yield from _Batch(model, tokenizer, prompts, sampling, batch_size).run()


class _Batch:
    """The rows that run, the prompts that wait, and the loop over both."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        prompts: Iterable[str],
        sampling: Sampling,
        batch_size: int,
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.stops = stop_tokens(model, tokenizer) if sampling.stop_at_eos else set()
        self.longest = getattr(model.config, "max_position_embeddings", None) or 2**31
        self.batch_size = batch_size
        self.incoming = enumerate(prompts)
        self.waiting: list[_Row] = []  # a heap, longest prompt first
        self.rows: dict[int, _Row] = {}  # by slot
        self.slots, self.planned = Slots(0), 0  # for so many tokens a row
        self.head: list[int] = []

    def run(self) -> Iterator[tuple[int, Answer]]:
        yield from self._read_ahead()
        many = len(self.waiting) >= PACK_FROM
        with own_attention(self.model), packed_weights(self.model) if many else nullcontext():
            while self.waiting or self.rows:
                try:
                    if not self.rows and (not self.slots.count or self._room(self.waiting[0]) > self.planned):
                        self._start()
                    finished = self._step()
                except (RuntimeError, MemoryError) as err:
                    if not is_out_of_memory(err):
                        raise
                    self._halve(err)
                    continue
                yield from finished
                yield from self._read_ahead()

    def _read_ahead(self) -> Iterator[tuple[int, Answer]]:
        """Read the next few batches when none waits; yield refusals of prompts without room for an answer.

        Topped up sooner, the heap would keep the short prompts back until the end.
        """
        if self.waiting:
            return
        while len(self.waiting) < LOOK_AHEAD * self.batch_size:
            place, prompt = next(self.incoming, (-1, ""))
            if place < 0:
                return
            ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            if 0 < len(ids) < self.longest:
                heapq.heappush(self.waiting, _Row(place, ids, seed_of(prompt, self.sampling.seed)))
            else:
                yield place, Answer("", 0, "refused", len(ids))

    def _start(self) -> None:
        """Make the slots, as many as memory allows, and compute the prompts' common head once."""
        self.planned = self._room(self.waiting[0])
        fitting = rows_that_fit(self.model, self.planned)
        self.slots = Slots(min(self.batch_size, fitting, len(self.waiting)))
        self.head = []
        if head := _common_head([row.ids for row in self.waiting]):
            self.slots.fit(len(head))
            self._forward([], [(0, _Row(-1, head, 0))])
            self.slots.keep_as_head(0, len(head))
            self.head = head

    def _room(self, row: _Row) -> int:
        return min(len(row.ids) + self.sampling.max_new_tokens, self.longest)

    def _step(self) -> list[tuple[int, Answer]]:
        """Run one pass; return what it finished."""
        going, entering = sorted(self.rows.items()), self._entering()
        self.rows.update(entering)
        width = max(row.length for row in self.rows.values())
        if not entering and len(going) < SPARSE * self.slots.count:
            self.slots.fit(width, keep=[slot for slot, _ in going])
            going = list(enumerate(row for _, row in going))
            self.rows = dict(going)
        self.slots.fit(width)
        logits = self._forward(going, entering)
        rows = [*going, *entering]
        tokens = choose(logits, [row.draw for _, row in rows], self.sampling)
        return [
            (row.place, self._ended(slot))
            for (slot, row), token in zip(rows, tokens, strict=True)
            if self._append(row, token)
        ]

    def _entering(self) -> list[tuple[int, _Row]]:
        """Take waiting rows into free slots, so many that one pass can hold their prompts."""
        free = [slot for slot in range(self.slots.count) if slot not in self.rows]
        entering: list[tuple[int, _Row]] = []
        tokens = 0
        while free and self.waiting and tokens < PROMPT_TOKENS:
            if self._room(self.waiting[0]) > self.planned:  # a longer one than the slots were made for
                break
            row = heapq.heappop(self.waiting)
            entering.append((free.pop(0), row))
            tokens += len(row.ids)
        return entering

    def _shared(self, row: _Row) -> int:
        """Return how many of a prompt's tokens are computed already."""
        head = len(self.head)
        return head if len(row.ids) > head + 1 and row.ids[:head] == self.head else 0

    def _forward(self, going: list[tuple[int, _Row]], entering: list[tuple[int, _Row]]) -> Any:
        """Return the scores of each row's next token, `(rows, vocab)`, going rows first."""
        import torch

        tokens = [row.out[-1] for _, row in going]
        positions = [row.length - 1 for _, row in going]
        last, new = list(range(len(going))), []
        for slot, row in entering:
            head = self._shared(row)
            new.append(Entering(slot, len(tokens), len(row.ids) - head, head))
            tokens += row.ids[head:]
            positions += range(head, len(row.ids))
            last.append(len(tokens) - 1)
        device = self.model.device
        lengths = torch.ones(self.slots.count, dtype=torch.long)
        for slot, row in going:
            lengths[slot] = row.length
        running = torch.tensor([slot for slot, _ in going], dtype=torch.long)
        self.slots.pack(running, lengths, new)
        # A CPU rounds a lone row otherwise, and what its vector registers leave over: rows come in pairs
        tokens, positions, last = _paired(tokens), _paired(positions), _paired(last)
        with torch.inference_mode():
            logits = self.model(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(last),
                distill_slots=self.slots,
            ).logits[0]
        return logits[: len(going) + len(entering)]

    def _append(self, row: _Row, token: int) -> bool:
        """Add a token to a row's answer; say whether that ends it."""
        row.out.append(token)
        full = len(row.out) >= self.sampling.max_new_tokens or row.length >= self.longest
        return token in self.stops or full

    def _ended(self, slot: int) -> Answer:
        row = self.rows.pop(slot)
        text = self.tokenizer.decode(row.out, skip_special_tokens=True).strip()
        finish: FinishReason = "stop" if row.out[-1] in self.stops else "length"
        return Answer(text, len(row.out), finish, len(row.ids))

    def _halve(self, err: Exception) -> None:
        """After memory ran out: send the running rows back and go on with half as many.

        Raises:
            EngineGone: a single row is too many.
        """
        rows = list(self.rows.values())
        ran = min(self.batch_size, len(rows) or self.slots.count)
        if ran <= 1:
            longest = max(len(row.ids) for row in [*rows, *self.waiting])
            raise EngineGone(
                f"out of memory with one prompt of {longest} tokens and {self.sampling.max_new_tokens} new;"
                " lower max_new_tokens, quantize the model or take a larger device"
            ) from err
        for row in rows:
            heapq.heappush(self.waiting, _Row(row.place, row.ids, row.seed))
        self.rows, self.slots = {}, Slots(0)
        self.batch_size = ran // 2
        traceback.clear_frames(err.__traceback__)  # they hold the tensors of the pass that failed
        release_memory()
        print(f"out of memory; going on with {self.batch_size} answers at a time", file=sys.stderr)


def _paired(values: list[int]) -> list[int]:
    return values + values[-1:] if len(values) % 2 else values


def _common_head(prompts: list[list[int]]) -> list[int]:
    """Return the tokens that all prompts begin with, if they are worth computing once."""
    first, last = min(prompts), max(prompts)  # in lexical order these two differ first
    head = 0
    while head < min(len(first), len(last)) - 2 and first[head] == last[head]:
        head += 1
    return first[:head] if len(prompts) > 1 and head >= HEAD_MIN else []


def stop_tokens(model: Model, tokenizer: Tokenizer) -> set[int]:
    """Return the ids that end an answer: the tokenizer's and the model's own, which may be several."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = own if isinstance(own, list) else [own]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}
