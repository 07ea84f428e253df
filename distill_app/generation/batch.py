"""The in-process engine: prompts in, answers with token counts and finish reasons out.

Rows run side by side, each in a slot as wide as it needs (`slots.py`). One forward pass holds one token of
every running row and the whole prompt of every row that enters, without padding; a row that ends leaves its
place to the next prompt.
Continuous batching: Yu et al., Orca, OSDI 2022.
"""

import heapq
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from random import Random
from typing import Any

from distill_app.core.errors import EngineGone
from distill_app.core.models import Model, Tokenizer
from distill_app.generation.answers import Answer, FinishReason, Sampling, cut_at, seed_of
from distill_app.generation.memory import is_out_of_memory, release_memory, tokens_that_fit
from distill_app.generation.packing import packed_weights
from distill_app.generation.sampler import NotFinite, choose, penalized
from distill_app.generation.slots import Entering, Slots, own_attention, width_for

REVISION = 1  # part of an answer's key: raise it with any change here or beside that may flip a token
PROMPT_TOKENS = 2048  # of entering prompts in one pass; more would only take memory
LOOK_AHEAD = 4  # batches of prompts read before their turn, to run those of like length side by side
HEAD_MIN = 8  # shared tokens worth computing once
HEAD = -1  # its row's number
PACK_FROM = 24  # prompts for which it pays to copy the weights into the CPU's own layout
GROW_AFTER = 32  # passes after memory ran out until twice as many rows run again
LONGEST_PATIENCE = 4096  # passes; each time that memory runs out, the wait doubles up to this
SHOWN_CHARACTERS = 60


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
    on_token: Callable[[int, int], object] | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Yield the place of each prompt and its answer, as soon as it is ready.

    Prompts are read a few batches ahead and enter longest first. Each draws from a random generator of its
    own, seeded by the prompt and the seed. In bfloat16 on a CPU an answer does not depend on the others.
    When memory runs out, the batch is halved, its unfinished rows begin again, and it grows back later; a
    prompt that does not fit even alone is refused.

    Args:
        batch_size: rows that run at a time, at most; fewer where memory is short.
        on_token: gets a prompt's place and each token of its answer as it is chosen; after a lack of memory
            an unfinished answer begins again.

    Raises:
        ValueError: the model's attention is of a kind that this engine cannot run.
        EngineGone: memory does not suffice for a single prompt.
    """
    yield from _Batch(model, tokenizer, prompts, sampling, batch_size, on_token).run()


class _Batch:
    """The rows that run, the prompts that wait, and the loop over both."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        prompts: Iterable[str],
        sampling: Sampling,
        batch_size: int,
        on_token: Callable[[int, int], object] | None,
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.on_token = on_token or (lambda place, token: None)
        self.stops = stop_tokens(model, tokenizer) if sampling.stop_at_eos else set()
        self.longest = getattr(model.config, "max_position_embeddings", None) or 2**31
        self.long_from = long_rope_from(model)
        # A stop text has a token a byte at most
        self.stop_tail = max((len(text.encode()) + 1 for text in sampling.stop), default=0)
        self.batch_size = batch_size
        self.incoming = enumerate(prompts)
        self.waiting: list[_Row] = []  # a heap, longest prompt first
        self.rows: dict[int, _Row] = {}  # that run, by place
        self.slots, self.room = Slots(), 0  # tokens that there is memory for
        self.head: list[int] | None = None
        self.limit = batch_size  # rows at a time, fewer after memory ran out
        self.calm, self.patience = 0, GROW_AFTER  # passes since then, and those until the limit doubles
        self.worked = False  # whether any row ever fitted

    def run(self) -> Iterator[tuple[int, Answer]]:
        yield from self._read_ahead()
        many = len(self.waiting) >= PACK_FROM
        with own_attention(self.model), packed_weights(self.model) if many else nullcontext():
            while self.waiting or self.rows:
                try:
                    if not self.rows:
                        self._start()
                    finished = self._step()
                except (RuntimeError, MemoryError) as err:
                    if not is_out_of_memory(err):
                        raise
                    finished = self._lighten(err)
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
        """See how much memory there is, and compute the prompts' common head once."""
        self.slots.arrange({})
        self.room = tokens_that_fit(self.model)
        if self.head is not None:
            return
        self.head = []  # of which nothing is shared while it is computed itself
        if head := _common_head([row.ids for row in self.waiting]):
            self.slots.arrange({HEAD: len(head)})
            self._forward([], [_Row(HEAD, head, 0)])
            self.slots.keep_as_head(HEAD, len(head))
            self.head = head

    def _need(self, row: _Row) -> int:
        """Return the tokens of memory that a row may come to take."""
        return width_for(min(len(row.ids) + self.sampling.max_new_tokens, self.longest))

    def _step(self) -> list[tuple[int, Answer]]:
        """Run one pass; return what it finished."""
        going, entering = list(self.rows.values()), self._entering()
        self.rows |= {row.place: row for row in entering}
        self.slots.arrange({row.place: row.length for row in self.rows.values()})
        chosen: list[tuple[_Row, int]] = []
        for some_going, some_entering in self._apart(going, entering):
            logits = self._forward(some_going, some_entering)
            rows = [*some_going, *some_entering]
            chosen += zip(rows, self._choose(logits, rows), strict=True)
        self._had_room()  # nothing was changed so far, should memory have run out
        return [(row.place, self._ended(row)) for row, token in chosen if self._append(row, token)]

    def _entering(self) -> list[_Row]:
        """Take waiting rows, as many as there is memory for and as one pass can hold prompts of."""
        entering: list[_Row] = []
        tokens, free = 0, self.room - sum(map(self._need, self.rows.values()))
        while self.waiting and len(self.rows) + len(entering) < self.limit and tokens < PROMPT_TOKENS:
            row = self._next_waiting()
            free -= self._need(row)
            if free < 0 and (self.rows or entering):
                heapq.heappush(self.waiting, row)
                break
            entering.append(row)
            tokens += len(row.ids)
        return entering

    def _next_waiting(self) -> _Row:
        """Take the longest prompt, or the shortest where not even a row alone has fitted so far."""
        if self.worked or self.limit > 1:
            return heapq.heappop(self.waiting)
        self.waiting.sort()  # which is a heap too
        return self.waiting.pop()

    def _apart(self, going: list[_Row], entering: list[_Row]) -> Iterator[tuple[list[_Row], list[_Row]]]:
        """Yield the rows of each forward pass, going ones in the order of their slots.

        A model with longrope takes other frequencies for all rows of a pass once one of them is long: so
        long rows have a pass of their own. One that becomes long is read anew, as in transformers.
        """
        order = {place: number for number, place in enumerate(self.slots.in_order(list(self.rows)))}
        going = sorted(going, key=lambda row: order[row.place])
        if self.long_from is None:
            yield going, entering
            return
        again = [row for row in going if row.length == self.long_from]
        for long in (False, True):
            some = [row for row in going if self._is_long(row) == long and row not in again]
            new = [row for row in [*entering, *(again if long else [])] if self._is_long(row) == long]
            if some or new:
                yield some, new

    def _is_long(self, row: _Row) -> bool:
        return self.long_from is not None and row.length >= self.long_from

    def _shared(self, row: _Row) -> int:
        """Return how many of a prompt's tokens are computed already."""
        head = self.head or []
        shares = len(row.ids) > len(head) + 1 and row.ids[: len(head)] == head and not self._is_long(row)
        return len(head) if shares else 0

    def _forward(self, going: list[_Row], entering: list[_Row]) -> Any:
        """Return the scores of each row's next token, `(rows, vocab)`, going rows first."""
        import torch

        tokens = [row.out[-1] for row in going]
        positions = [row.length - 1 for row in going]
        last, new = list(range(len(going))), []
        for row in entering:
            head, ids = self._shared(row), row.ids + row.out
            new.append(Entering(row.place, len(tokens), len(ids) - head, head))
            tokens += ids[head:]
            positions += range(head, len(ids))
            last.append(len(tokens) - 1)
        self.slots.pack({row.place: row.length for row in going}, new)
        # A CPU rounds a lone row otherwise, and what its vector registers leave over: rows come in pairs
        tokens, positions, last = _paired(tokens), _paired(positions), _paired(last)
        device = self.model.device
        with torch.inference_mode():
            logits = self.model(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(last),
                distill_slots=self.slots,
            ).logits[0]
        return logits[: len(going) + len(entering)]

    def _choose(self, logits: Any, rows: list[_Row]) -> list[int]:
        penalty = self.sampling.repetition_penalty
        if penalty != 1:
            logits = penalized(logits, [row.ids + row.out for row in rows], penalty)
        try:
            return choose(logits, [row.draw for row in rows], self.sampling)
        except NotFinite as err:
            prompt = self.tokenizer.decode(rows[err.row].ids)
            raise EngineGone(
                f"prompt {prompt[:SHOWN_CHARACTERS]!r}: found logits that are NaN or infinite, expected"
                " numbers; check the model's weights, dtype and quantization"
            ) from err

    def _append(self, row: _Row, token: int) -> bool:
        """Add a token to a row's answer; say whether that ends it."""
        row.out.append(token)
        self.on_token(row.place, token)
        full = len(row.out) >= self.sampling.max_new_tokens or row.length >= self.longest
        return token in self.stops or full or self._said_stop(row)

    def _said_stop(self, row: _Row) -> bool:
        if not self.stop_tail:
            return False
        return cut_at(self._text(row.out[-self.stop_tail :]), self.sampling.stop)[1]

    def _text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _ended(self, row: _Row) -> Answer:
        del self.rows[row.place]
        text, stopped = cut_at(self._text(row.out), self.sampling.stop)
        finish: FinishReason = "stop" if stopped or row.out[-1] in self.stops else "length"
        return Answer(text.strip(), len(row.out), finish, len(row.ids))

    def _had_room(self) -> None:
        """After a pass that fitted: let more rows run again, once memory has sufficed for a while."""
        self.worked = True
        self.calm += 1
        if self.limit < self.batch_size and self.calm >= self.patience:
            self.limit, self.calm = min(2 * self.limit, self.batch_size), 0

    def _lighten(self, err: Exception) -> list[tuple[int, Answer]]:
        """After memory ran out: send the rows back and go on with half as many; refuse a row that was alone.

        Raises:
            EngineGone: not even the shortest prompt fits.
        """
        rows = list(self.rows.values())
        self.rows, self.slots = {}, Slots()
        traceback.clear_frames(err.__traceback__)  # they hold the tensors of the pass that failed
        release_memory()
        if not rows:
            self.head = []  # it was the common head that did not fit
            return []
        self.head = None
        if len(rows) == 1:
            return [(rows[0].place, self._refused(rows[0], err))]
        for row in rows:
            heapq.heappush(self.waiting, _Row(row.place, row.ids, row.seed))
        self.limit, self.calm = len(rows) // 2, 0
        self.patience = min(2 * self.patience, LONGEST_PATIENCE)
        _say(f"out of memory; going on with {self.limit} answers at a time, more again where there is room")
        return []

    def _refused(self, row: _Row, err: Exception) -> Answer:
        shorter = any(len(other.ids) < len(row.ids) for other in self.waiting)
        if not self.worked and not shorter:
            raise EngineGone(
                f"out of memory with one prompt of {len(row.ids)} tokens and {self.sampling.max_new_tokens}"
                " new; lower max_new_tokens, quantize the model or take a larger device"
            ) from err
        shown = " ".join(self._text(row.ids[:SHOWN_CHARACTERS]).split())[:SHOWN_CHARACTERS]
        _say(f"a prompt of {len(row.ids)} tokens finds no room even alone; left out as refused: {shown!r}")
        if self.worked:  # it alone was too long, so the others need not suffer
            self.limit, self.calm, self.patience = self.batch_size, 0, GROW_AFTER
        return Answer("", 0, "refused", len(row.ids), lasting=False)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def long_rope_from(model: Model) -> int | None:
    """Return the length from which a model with longrope uses other frequencies; None for other models."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return int(rope["original_max_position_embeddings"]) + 1


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
