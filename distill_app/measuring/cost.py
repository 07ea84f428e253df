"""What an answer costs: seconds alone and in company, memory, size."""

import gc
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill_app.core.models import Model, Tokenizer
from distill_app.labeling.answers import Sampling
from distill_app.labeling.engine import stream_answers
from distill_app.measuring.params import MeasureParams

RESET_PEAK = "5"  # to /proc/PID/clear_refs: the peak of resident memory starts anew (proc(5))


def measure_cost(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[str], params: MeasureParams
) -> dict[str, Any]:
    """Return seconds for each of `speed_prompts` prompts, alone and all at once, and the peak memory then.

    Every model does the same work, `speed_tokens` a prompt, however soon its own answers would end. The
    best of `speed_rounds` counts: what else the machine does can only make a round slower.

    Returns:
        `alone_sec` and `batch_sec`, one number a prompt; `tokens`, generated for each; and
        `peak_memory_bytes`, of the GPU where there is one, else of the process; None where it is not told.
    """
    asked = list(prompts[: params.speed_prompts])
    sampling = Sampling(params.speed_tokens, stop_at_eos=False)
    with _peak_memory() as peak:
        _seconds(model, tokenizer, asked[:1], sampling)  # what is compiled or cached at first
        alone = [_seconds(model, tokenizer, [prompt], sampling) for prompt in asked]
        batch = _seconds(model, tokenizer, asked, sampling)
        for _ in range(params.speed_rounds - 1):
            again = [_seconds(model, tokenizer, [prompt], sampling) for prompt in asked]
            alone = [min(pair) for pair in zip(alone, again, strict=True)]
            batch = min(batch, _seconds(model, tokenizer, asked, sampling), key=max)
    return {
        "tokens": params.speed_tokens,
        "alone_sec": [round(seconds[0], 4) for seconds in alone],
        "batch_sec": [round(seconds, 4) for seconds in batch],
        "peak_memory_bytes": peak[0] if peak else None,
    }


def size_of(model: Model, name: str) -> dict[str, int]:
    """Return the parameters and the weights' bytes: on disk, or in memory for a model of the Hub."""
    files = list(Path(name).glob("*.safetensors"))
    size = sum(f.stat().st_size for f in files) if files else int(model.get_memory_footprint())
    return {"parameters": model.num_parameters(), "bytes": size}


def _seconds(model: Model, tokenizer: Tokenizer, prompts: list[str], sampling: Sampling) -> list[float]:
    """Return when each answer was there, counted from the start, in the order of the prompts."""
    start = time.perf_counter()
    done = {
        place: time.perf_counter() - start
        for place, _ in stream_answers(model, tokenizer, prompts, sampling, len(prompts))
    }
    return [done[place] for place in range(len(prompts))]


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Give a list that holds the peak in bytes when the block has ended; it stays empty if nobody tells."""
    import torch

    peak: list[int] = []
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.append(torch.cuda.max_memory_allocated())
        return
    try:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    except OSError:  # not Linux, or a sandbox
        yield peak
        return
    yield peak
    if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
        peak.append(1024 * int(found[1]))
