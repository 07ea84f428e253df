"""Shows what Ray does to labelling: the same prompts asked in this process, then of two Ray workers on this
machine, one of which is killed in the middle.

make bench-ray [PROMPTS=FILE]

FILE is a JSON list of {instruction, input}; without it, the project's own sample. Greedy, in bfloat16. The
workers' seconds hold starting Ray, loading the model in every worker, and the death; on two cores two workers
are no faster than one.
"""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from label import arguments, read_prompts

from distill_app.core.models import load_teacher, load_tokenizer
from distill_app.generation.answers import Answer, Engine, Sampling
from distill_app.generation.in_process import InProcess
from distill_app.generation.ray_workers import RayWorkers

WORKERS = 2
BATCH_SIZE = 8


def main() -> None:
    """Label twice and compare."""
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
        if any("LabelWorker" in word for word in process.cmdline()):
            yield process.pid


if __name__ == "__main__":
    main()
