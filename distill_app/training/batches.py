"""A step's examples as packed rows, with the teacher's distributions beside them."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn.functional import pad

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
            here, there = (
                slice(end - example.known, end),
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
