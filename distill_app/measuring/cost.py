"""What an answer costs: seconds alone and in company, memory, size."""

import gc
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill_app.core.models import Model, Tokenizer
from distill_app.labeling.answers import Sampling
from distill_app.labeling.engine import stream_answers
from distill_app.measuring.params import MeasureParams

RESET_PEAK = "5"  # to /proc/PID/clear_refs: the peak of resident memory starts anew (proc(5))


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to answer, and the instructions as it is asked."""

    model: Model
    tokenizer: Tokenizer
    identity: dict[str, Any]  # of the engine that answers with it
    prompts: list[str]


def with_room(loaded: Mapping[str, Loaded], params: MeasureParams) -> dict[str, Loaded]:
    """Return the models with the prompts alone by which to time them: those that leave all of them room.

    An engine refuses a prompt that is too long, which takes no time at all.

    Raises:
        ValueError: no prompt does.
    """
    fits = [[has_room(one, prompt, params.speed_tokens) for prompt in one.prompts] for one in loaded.values()]
    places = [place for place, all_fit in enumerate(map(all, zip(*fits, strict=True))) if all_fit]
    if not places:
        name = min(loaded, key=lambda name: _positions(loaded[name]))
        raise ValueError(
            f"measure.speed_tokens: found {params.speed_tokens}, for which none of {len(fits[0])} held-out"
            f" instructions leaves all models room ({name} has {_positions(loaded[name])} positions);"
            " lower it, or hold out shorter instructions"
        )
    chosen = places[: params.speed_prompts]
    return {name: replace(one, prompts=[one.prompts[p] for p in chosen]) for name, one in loaded.items()}


def has_room(one: Loaded, text: str, tokens: int) -> bool:
    """Tell whether a model can read a text and write so many tokens after it."""
    count = len(one.tokenizer(text, add_special_tokens=False)["input_ids"])
    return 0 < count <= _positions(one) - tokens


def _positions(one: Loaded) -> int:
    return getattr(one.model.config, "max_position_embeddings", None) or 2**31


def measure_speed(loaded: Mapping[str, Loaded], params: MeasureParams) -> dict[str, dict[str, Any]]:
    """Return of each model the seconds for each of its prompts, alone and all at once.

    The models take turns at every prompt, so that whatever else the machine does slows all alike. Each does
    the same work, `speed_tokens` a prompt, however soon its own answers would end. The best of
    `speed_rounds` counts: others can only make a round slower.

    Returns:
        `alone_sec` and `batch_sec`, one number a prompt, and `tokens`, generated for each.
    """
    sampling = Sampling(params.speed_tokens, stop_at_eos=False)
    count = len(next(iter(loaded.values())).prompts)
    alone = {name: [math.inf] * count for name in loaded}
    batch = {name: [math.inf] * count for name in loaded}
    for one in loaded.values():
        _seconds(one, one.prompts[:1], sampling)  # what is compiled or cached at first
    for _ in range(params.speed_rounds):
        for place in range(count):
            for name, one in loaded.items():
                seconds = _seconds(one, [one.prompts[place]], sampling)[0]
                alone[name][place] = min(alone[name][place], seconds)
        for name, one in loaded.items():
            batch[name] = min(batch[name], _seconds(one, one.prompts, sampling), key=max)
    return {
        name: {
            "tokens": params.speed_tokens,
            "alone_sec": [round(seconds, 6) for seconds in alone[name]],
            "batch_sec": [round(seconds, 6) for seconds in batch[name]],
        }
        for name in loaded
    }


def peak_memory(one: Loaded, params: MeasureParams) -> int | None:
    """Return the bytes of a model and of what it adds at most while it answers its prompts at once.

    The weights' own size stands for them, since what libraries took at their first use would count for the
    model that is loaded first. None where the system does not tell the peak.
    """
    gc.collect()
    before = _in_use()
    with _peak_in_use() as peak:
        _seconds(one, one.prompts, Sampling(params.speed_tokens, stop_at_eos=False))
    return int(one.model.get_memory_footprint()) + max(0, peak[0] - before) if peak else None


def _in_use() -> int:
    """Return the bytes of the GPU's tensors, or without one of this process."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    return int(psutil.Process().memory_info().rss)


def size_of(model: Model, name: str) -> dict[str, int]:
    """Return the parameters and the weights' bytes: on disk, or in memory for a model of the Hub."""
    files = list(Path(name).glob("*.safetensors"))
    size = sum(f.stat().st_size for f in files) if files else int(model.get_memory_footprint())
    return {"parameters": model.num_parameters(), "bytes": size}


def _seconds(one: Loaded, prompts: list[str], sampling: Sampling) -> list[float]:
    """Return when each answer was there, counted from the start, in the order of the prompts."""
    start = time.perf_counter()
    done = {
        place: time.perf_counter() - start
        for place, _ in stream_answers(one.model, one.tokenizer, prompts, sampling, len(prompts))
    }
    return [done[place] for place in range(len(prompts))]


@contextmanager
def _peak_in_use() -> Iterator[list[int]]:
    """Give a list that holds the peak in bytes when the block has ended; it stays empty if nobody tells."""
    import torch

    peak: list[int] = []
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
