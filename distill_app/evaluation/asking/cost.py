"""What an answer costs: seconds alone and under load, memory, size."""

import ctypes
import gc
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_app.core.models import Model
from distill_app.evaluation.asking.params import MeasureParams
from distill_app.generation.answers import Answer, Engine, Sampling

RESET_PEAK = "5"  # to /proc/PID/clear_refs: the peak of resident memory starts anew (proc(5))


@dataclass(frozen=True)
class Timed:
    """A model and the prompts of one task by which it is timed."""

    engine: Engine
    prompts: Sequence[str]


def time_answers(timed: Mapping[str, Timed], params: MeasureParams) -> dict[str, dict[str, Any]]:
    """Return of each model how long its answers to one task take, one at a time and under load.

    The models take turns at every prompt and round, so that whatever else the machine does slows all alike.
    Answers are timed as far as `timed_tokens`, and once more up to their first token: so reading a prompt and
    writing an answer are told apart, and an answer of any length can be reckoned.

    Returns:
        `first_sec` and `alone_sec`, `(rounds, prompts)`: to the first token and to the last; `alone_tokens`,
        `(prompts,)`, written by then; `load_sec`, `(rounds,)`, until `load_prompts` answers at once had
        ended, which have `load_tokens` in all; `working_bytes`, what answering those at once adds to the
        weights (None where nobody tells).
    """
    found: dict[str, dict[str, Any]] = {name: _empty() for name in timed}
    whole = Sampling(params.max_new_tokens if params.timed_tokens is None else params.timed_tokens)
    first = Sampling(1)
    for one in timed.values():
        _answers(one.engine, one.prompts[:1], first)  # what is compiled or cached at first
    for _ in range(params.timed_rounds):
        for of in found.values():
            of["first_sec"].append([])
            of["alone_sec"].append([])
        for place in range(params.timed_prompts):
            for name, one in timed.items():
                prompt, of = one.prompts[place : place + 1], found[name]
                if not prompt:
                    continue
                of["first_sec"][-1].append(_seconds(one.engine, prompt, first)[0])
                seconds, answers = _seconds(one.engine, prompt, whole)
                of["alone_sec"][-1].append(seconds)
                if len(of["alone_tokens"]) <= place:
                    of["alone_tokens"].append(answers[0].tokens)
        for name, one in timed.items():
            _load(one, params.load_prompts, whole, found[name])
    return found


def _empty() -> dict[str, Any]:
    return {"first_sec": [], "alone_sec": [], "alone_tokens": [], "load_sec": [], "working_bytes": None}


def _load(one: Timed, count: int, sampling: Sampling, found: dict[str, Any]) -> None:
    """Add one round under load; the first one also tells what memory it took."""
    prompts = list(one.prompts[:count])
    if found["load_sec"]:
        seconds, answers = _seconds(one.engine, prompts, sampling)
    else:
        with _working_bytes() as peak:
            seconds, answers = _seconds(one.engine, prompts, sampling)
        found["working_bytes"] = peak[0] if peak else None
    found["load_sec"].append(seconds)
    found["load_prompts"] = len(prompts)
    found["load_tokens"] = sum(answer.tokens for answer in answers)


def _seconds(engine: Engine, prompts: Sequence[str], sampling: Sampling) -> tuple[float, list[Answer]]:
    start = time.perf_counter()
    answers = _answers(engine, prompts, sampling)
    return round(time.perf_counter() - start, 6), answers


def _answers(engine: Engine, prompts: Sequence[str], sampling: Sampling) -> list[Answer]:
    found = dict(engine.generate(prompts, sampling))
    return [found[place] for place in range(len(prompts))]


def size_of(model: Model, name: str) -> dict[str, int]:
    """Return the parameters, and the weights' bytes on disk (in memory for a Hub model) and in memory."""
    files = list(Path(name).glob("*.safetensors"))
    size = sum(f.stat().st_size for f in files) if files else int(model.get_memory_footprint())
    return {
        "parameters": model.num_parameters(),
        "bytes": size,
        "loaded_bytes": int(model.get_memory_footprint()),
    }


@contextmanager
def _working_bytes() -> Iterator[list[int]]:
    """Give a list that holds, when the block has ended, the bytes that it took at most beside what was there.

    On a CPU what earlier work has freed is given back to the system before, else it would hide what the block
    takes. The list stays empty where the system does not tell.
    """
    import torch

    gc.collect()
    peak: list[int] = []
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.append(torch.cuda.max_memory_allocated() - before)
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc's
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    except (AttributeError, OSError):  # another C library, not Linux, or a sandbox
        yield peak
        return
    before = status_bytes("VmRSS")
    yield peak
    peak.append(max(0, status_bytes("VmHWM") - before))


def status_bytes(key: str) -> int:
    """Return a number of bytes from this process's status (proc(5))."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0
