"""Shows what Ray does to labelling: the same prompts asked in this process, then of two Ray workers on this
machine, one of which is killed in the middle.

make bench-ray [PROMPTS=FILE], or for the scheduling alone: python benchmarks/ray_labels.py --stubbed 1000000

FILE is a JSON list of {instruction, input}; without it, the project's own sample. Greedy, in bfloat16. The
workers' seconds hold starting Ray, loading the model in every worker, and the death; on two cores two workers
are no faster than one. `--stubbed N` pushes N prompts through two workers whose engine answers at once, and
prints the rate and this process's peak memory.
"""

import argparse
import os
import resource
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from label import arguments, read_prompts

from distill_app.core.models import load_teacher, load_tokenizer
from distill_app.generation.answers import Answer, Engine, Sampling
from distill_app.generation.in_process import InProcess
from distill_app.generation.ray_workers import RayWorkers

WORKERS = 2
BATCH_SIZE = 8
STUBBED_CHUNK = 256  # the batch of a GPU's vLLM


class Stub:
    """Answers at once with the prompt, so that what remains is the work of handing out and back."""

    teacher = "stub"

    def __init__(self) -> None:
        self.identity: dict[str, Any] = {"engine": "stub"}

    def render(self, instruction: str, input_text: str, mode: str) -> str:
        return instruction

    def generate(self, prompts: Iterable[str], sampling: Sampling) -> Iterator[tuple[int, Answer]]:
        for place, prompt in enumerate(prompts):
            yield place, Answer(prompt, 1, "stop")

    def close(self) -> None:
        pass


def main() -> None:
    """Label twice and compare, or measure the scheduling."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--stubbed", type=int, default=0, help="so many answers of a stub")
    stubbed, rest = parser.parse_known_args()
    if stubbed.stubbed:
        push(stubbed.stubbed)
        return
    sys.argv[1:] = rest
    args = arguments(count=96, max_new_tokens=48)
    make = partial(open_engine, args.model)
    alone = make()
    prompts = read_prompts(args.prompts, args.count, load_tokenizer(args.model))
    sampling = Sampling(args.max_new_tokens)
    expected, alone_sec = label(alone, prompts, sampling, kill_after=None)
    workers = RayWorkers(make, WORKERS)
    found, spread_sec = label(workers, prompts, sampling, kill_after=len(prompts) // 3)
    different = sum(expected[place] != found[place] for place in expected)
    print(f"prompts        {len(prompts)}, at most {args.max_new_tokens} new tokens")
    print(f"in process     {alone_sec:.1f} s")
    print(f"{WORKERS} Ray workers  {spread_sec:.1f} s, one killed after {len(prompts) // 3} answers")
    print(f"asked again    {workers.asked_again} prompts")
    print(f"answers equal  {'no' if different else 'yes'}, {different} of {len(prompts)} differ")


def push(number: int) -> None:
    """Push so many prompts through two workers; print the rate and what memory the driver took."""
    workers = RayWorkers(Stub, WORKERS, chunk=STUBBED_CHUNK)
    prompts = (f"prompt {n}: how much is {n} and {n}?" for n in range(number))
    before_mib = peak_mib()
    start, first, total = time.perf_counter(), 0.0, 0
    for _place, answer in workers.generate(prompts, Sampling()):
        first = first or time.perf_counter()
        total += answer.tokens
        if total % max(number // 10, 1) == 0:
            print(f"{total:12,} answers, peak {peak_mib():.0f} MiB", flush=True)
    seconds, starting = time.perf_counter() - start, first - start
    workers.close()
    if total != number:
        raise RuntimeError(f"found {total} answers, expected {number}")
    print(f"{number:,} answers of {WORKERS} workers: {seconds:.1f} s, {starting:.1f} s to the first")
    rate = number / (seconds - starting)
    print(f"{rate:,.0f} answers/s; driver {before_mib:.0f} MiB before, at most {peak_mib():.0f} MiB")


def peak_mib() -> float:
    """Return the most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def open_engine(teacher: str) -> InProcess:
    return InProcess(teacher, {}, load_tokenizer(teacher), partial(load_model, teacher), BATCH_SIZE)


def load_model(teacher: str) -> Any:
    return load_teacher(teacher, "none")[0]


def label(
    engine: Engine, prompts: list[str], sampling: Sampling, kill_after: int | None
) -> tuple[dict[int, Answer], float]:
    """Return the answers by place, and the seconds from the first prompt to the last answer."""
    answers: dict[int, Answer] = {}
    start = time.perf_counter()
    for place, answer in engine.generate(prompts, sampling):
        if place in answers:
            raise RuntimeError(f"prompt {place}: found a second answer, expected one")
        answers[place] = answer
        if len(answers) == kill_after:
            pid = next(worker_pids())
            print(f"killing worker process {pid}", flush=True)
            os.kill(pid, signal.SIGKILL)
    seconds = time.perf_counter() - start
    engine.close()
    return answers, seconds


def worker_pids() -> Iterator[int]:
    """Yield the processes of this machine's Ray workers that descend from this one."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        if any("MapWorker" in word for word in process.cmdline()):
            yield process.pid


if __name__ == "__main__":
    main()
