"""The in-process engine: prompts in, answers with token counts and finish reasons out."""

import hashlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from distill_app.core.models import Model, Tokenizer
from distill_app.labeling.answers import Answer, Sampling

SHRINK_BELOW = 0.75  # rows leave the batch when fewer than this share still runs; each cut is a copy
REPORT_EVERY_SEC = 10.0


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    batch_size: int = 64,
    label: str = "",
) -> list[Answer]:
    """Return one answer for each prompt, in the order of the prompts.

    Prompts run in batches of similar length, and a row leaves its batch soon after its answer ends.
    Each prompt draws from a random generator of its own, seeded by the prompt and the seed.

    Args:
        label: what is being generated; with it, progress goes to stderr every ten seconds.
    """
    import torch

    token_ids = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(token_ids[i]))
    answers: dict[int, Answer] = {}
    progress = _Progress(label, len(prompts))
    with torch.inference_mode():
        for start in range(0, len(prompts), batch_size):
            rows = longest_first[start : start + batch_size]
            seeds = [_seed_of(prompts[i], sampling.seed) for i in rows]
            outputs = _generate_batch(model, tokenizer, [token_ids[i] for i in rows], seeds, sampling)
            answers.update(zip(rows, (_as_answer(tokenizer, ids) for ids in outputs), strict=True))
            progress.add(len(rows), sum(map(len, outputs)))
    progress.close()
    return [answers[i] for i in range(len(prompts))]


def _seed_of(prompt: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % 2**63


def _as_answer(tokenizer: Tokenizer, ids: list[int]) -> Answer:
    stopped = bool(ids) and ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Answer(text, len(ids), "stop" if stopped else "length")


def _generate_batch(
    model: Model,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    seeds: list[int],
    sampling: Sampling,
) -> list[list[int]]:
    """Return the generated ids of each row, the end-of-sequence token included where it came."""
    import torch
    from transformers import DynamicCache

    input_ids, mask = _left_padded(prompts, tokenizer.pad_token_id, model.device)
    generators = [torch.Generator().manual_seed(s) for s in seeds] if sampling.temperature else []
    rows = list(range(len(prompts)))  # the prompt that each row of the running batch answers
    outputs: list[list[int]] = [[] for _ in prompts]
    cache = DynamicCache(config=model.config)
    eos = tokenizer.eos_token_id if sampling.stop_at_eos else None
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(sampling.max_new_tokens):
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens = _choose(logits, [generators[i] for i in rows] if generators else [], sampling)
        running = _append(outputs, rows, tokens.tolist(), eos)
        if not running:
            break
        if len(running) < SHRINK_BELOW * len(rows):
            keep = torch.tensor(running, device=model.device)
            cache.batch_select_indices(keep)
            tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
            rows = [rows[i] for i in running]
        input_ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
    return outputs


def _append(outputs: list[list[int]], rows: list[int], tokens: list[int], eos: int | None) -> list[int]:
    """Add each row's token unless its answer has ended; return the rows of the batch still running."""
    running = []
    for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if outputs[row][-1:] == [eos]:
            continue
        outputs[row].append(token)
        if token != eos:
            running.append(place)
    return running


def _left_padded(prompts: list[list[int]], pad: int, device: Any) -> tuple[Any, Any]:
    """Return ids and mask, `(batch, tokens)`, each prompt ending in the last column."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def _choose(logits: Any, generators: list[Any], sampling: Sampling) -> Any:
    """Return one token id a row, `(batch,)`, from `(batch, vocab)` logits."""
    import torch

    if not sampling.temperature:
        return logits.argmax(-1)
    probs, order = torch.softmax(logits.float() / sampling.temperature, -1).sort(-1, descending=True)
    total = probs.cumsum(-1)
    probs = probs.masked_fill(total - probs > sampling.top_p, 0.0)  # nucleus, arXiv:1904.09751
    total = probs.cumsum(-1)
    draws = torch.stack([torch.rand(1, generator=g) for g in generators]).to(logits.device)
    place = (total < draws * total[:, -1:]).sum(-1, keepdim=True).clamp(max=probs.shape[-1] - 1)
    return order.gather(-1, place)[:, 0]


class _Progress:
    """Done of all, tokens per second, time left: one line on stderr every so often."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self.done = self.tokens = 0
        self.start = self.reported = time.monotonic()

    def add(self, answers: int, tokens: int) -> None:
        self.done += answers
        self.tokens += tokens
        now = time.monotonic()
        if self.label and self.done < self.total and now - self.reported > REPORT_EVERY_SEC:
            self.reported = now
            left = (now - self.start) / self.done * (self.total - self.done)
            self._print(f"about {left:.0f} s left")

    def close(self) -> None:
        if self.label and self.done:
            self._print(f"{time.monotonic() - self.start:.0f} s")

    def _print(self, time_text: str) -> None:
        rate = self.tokens / max(time.monotonic() - self.start, 1e-9)
        line = f"{self.label}: {self.done} of {self.total}, {rate:.0f} tokens/s, {time_text}"
        print(line, file=sys.stderr, flush=True)
