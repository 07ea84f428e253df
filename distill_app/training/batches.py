"""A step's examples as packed rows, with the teacher's distributions beside them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from torch.utils.data import DataLoader

from distill_app.core.logits import TopLogits
from distill_app.training.examples import NO_LOSS, Example
from distill_app.training.packing import split_by_tokens

Batch = dict[str, torch.Tensor]


class Collator:
    """Lays examples one behind the other in one row.

    The result holds `input_ids`, `labels`, `position_ids` `(1, tokens)` and `lengths` `(examples,)`; with a
    teacher also `teacher_ids`, `teacher_logprobs` `(1, tokens, K)`, `teacher_tail` and `teacher_known`
    `(1, tokens)`, which belong to the label at their place.
    """

    def __init__(self, logits: TopLogits | None = None) -> None:
        self.logits = logits

    def __call__(self, examples: Sequence[Example]) -> Batch:
        batch = {
            "input_ids": torch.tensor([[token for e in examples for token in e.input_ids]]),
            "labels": torch.tensor([[label for e in examples for label in e.labels]]),
            "position_ids": torch.cat([torch.arange(len(e.input_ids)) for e in examples])[None],
            "lengths": torch.tensor([len(e.input_ids) for e in examples]),
        }
        return batch if self.logits is None else {**batch, **self._teacher(examples, self.logits)}

    def _teacher(self, examples: Sequence[Example], logits: TopLogits) -> Batch:
        tokens = sum(len(e.input_ids) for e in examples)
        ids = np.zeros((tokens, logits.top), np.int64)
        logprobs = np.zeros((tokens, logits.top), np.float32)
        tail = np.zeros(tokens, np.float32)
        known = np.zeros(tokens, bool)
        end = 0
        for example in examples:
            end += len(example.input_ids)
            last = end - example.unknown_end
            here, there = (
                slice(last - example.known, last),
                slice(example.offset, example.offset + example.known),
            )
            row = logits[example.row]
            ids[here], logprobs[here], tail[here] = row.ids[there], row.logprobs[there], row.tail[there]
            known[here] = True
        return {
            "teacher_ids": torch.from_numpy(ids)[None],
            "teacher_logprobs": torch.from_numpy(logprobs)[None],
            "teacher_tail": torch.from_numpy(tail)[None],
            "teacher_known": torch.from_numpy(known)[None],
        }


class StepBatches:
    """The places of each step's examples; of them, this process's share. A DataLoader's batch sampler.

    Every process draws the same steps and takes an even share of their tokens. One that is left without an
    example, as at the end of an epoch, takes the place `len(lengths)`: an example that does not count.

    Args:
        lengths: tokens of each example.
        examples: of a step, on all devices together; the last step of an epoch may have fewer.
        tokens: of a step, about, in place of a number of examples.
        seed: of the order; each epoch has another.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        examples: int,
        tokens: int | None = None,
        seed: int = 0,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        self.lengths, self.examples, self.seed = lengths, examples, seed
        self.processes, self.process = processes, process
        self.epoch = 0
        self.steps = -(-len(lengths) // examples)
        self.by_tokens = tokens is not None
        if tokens is not None:
            # So that no step is left without an example, it holds the longest on average
            self.steps = max(1, min(-(-sum(lengths) // tokens), sum(lengths) // max(lengths)))

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps():
            shares = split_by_tokens([self.lengths[p] for p in step], sum(self.lengths), self.processes)
            if self.process < len(shares):
                yield [step[place] for place in shares[self.process]]
            else:
                yield [len(self.lengths)]

    def _steps(self) -> list[list[int]]:
        order = torch.randperm(
            len(self.lengths), generator=torch.Generator().manual_seed(self.seed + self.epoch)
        ).tolist()
        if not self.by_tokens:
            return [order[start : start + self.examples] for start in range(0, len(order), self.examples)]
        steps: list[list[int]] = [[] for _ in range(self.steps)]
        before, total = 0, sum(self.lengths)
        for place in order:
            steps[before * self.steps // total].append(place)
            before += self.lengths[place]
        return steps


class StepLoader(DataLoader[Any]):
    """A DataLoader over `StepBatches`, which passes the epoch on to them."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        batches: Any = self.batch_sampler
        batches.set_epoch(epoch)


def uncounted(example: Example) -> Example:
    """Return an example of which nothing is learned, for a process that has none of its own."""
    return Example(example.input_ids, [NO_LOSS] * len(example.labels), example.row)


def parts_of(batch: Batch, token_budget: int, at_least: int = 1) -> Iterator[Batch]:
    """Yield a packed row's examples as packed rows of at most `token_budget` tokens, or one example's."""
    lengths = batch["lengths"].tolist()
    ends = np.cumsum(lengths).tolist()
    for group in split_by_tokens(lengths, token_budget, at_least):
        spans = [slice(ends[place] - lengths[place], ends[place]) for place in group]
        yield {
            name: values[group] if name == "lengths" else torch.cat([values[:, s] for s in spans], 1)
            for name, values in batch.items()
        }


def first_token(batch: Batch) -> Batch:
    """Return the first token of a packed row as a row of its own: it has no label, so nothing is learned."""
    first = {name: values[:, :1] for name, values in batch.items() if name != "lengths"}
    return {**first, "lengths": torch.ones_like(batch["lengths"][:1])}


def rounded_up(batch: Batch, multiple: int) -> Batch:
    """Return a packed row with an example of nothing behind it that rounds its length up.

    Few different lengths: a CPU's library makes its kernels once for each, and the memory of one row fits the
    next.
    """
    missing = -batch["input_ids"].shape[1] % multiple
    if not missing:
        return batch
    longer = {
        name: pad(
            values, (0, 0) * (values.dim() - 2) + (0, missing), value=NO_LOSS if name == "labels" else 0
        )
        for name, values in batch.items()
        if name != "lengths"
    }
    return {**longer, "lengths": pad(batch["lengths"], (0, 1), value=missing)}
