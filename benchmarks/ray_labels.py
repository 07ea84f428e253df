"""Shows what Ray does to labelling: the same prompts asked in this process, then of two Ray workers on this
machine, one of which is killed in the middle.

python benchmarks/ray_labels.py [--prompts 96] [--max-new-tokens 48] [--items FILE] [--teacher DIR]

FILE is a JSON list of {instruction, input}; without it, System 1's training instructions of the sample,
which `dvc repro prepare_s1` writes. DIR is a checkpoint folder; without it the bundled teacher, which
`dvc repro base_models` writes. Greedy decoding in bfloat16. The workers' seconds hold starting Ray, loading
the model in every worker, and the death; on two cores two workers are no faster than one.
"""

import argparse
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from distill_app.core.files import read_json
from distill_app.core.models import load_teacher, load_tokenizer
from distill_app.labeling.answers import Answer, Engine, Sampling
from distill_app.labeling.in_process import InProcess
from distill_app.labeling.ray_workers import RayWorkers

WORKERS = 2


def main() -> None:
    options = read_options()
    items = read_json(options.items)[: options.prompts]
    make = partial(open_engine, options.teacher, options.batch_size)
    sampling = Sampling(options.max_new_tokens)
    alone, alone_sec = label(make(), items, sampling, kill_after=None)
    workers = RayWorkers(make, WORKERS)
    spread, spread_sec = label(workers, items, sampling, kill_after=len(items) // 3)
    different = sum(alone[place].text != spread[place].text for place in alone)
    print(f"prompts        {len(items)}, at most {options.max_new_tokens} new tokens")
    print(f"in process     {alone_sec:.1f} s")
    print(f"{WORKERS} Ray workers  {spread_sec:.1f} s, one killed after {len(items) // 3} answers")
    print(f"asked again    {workers.asked_again} prompts")
    print(f"answers equal  {'no' if different else 'yes'}, {different} of {len(items)} differ")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--items", default="data/train_instructions.json")
    parser.add_argument("--teacher", default="models/base/teacher")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=8)
    return parser.parse_args()


def open_engine(teacher: str, batch_size: int) -> InProcess:
    return InProcess(teacher, {}, load_tokenizer(teacher), partial(load_model, teacher), batch_size)


def load_model(teacher: str) -> Any:
    return load_teacher(teacher, "none")[0]


def label(
    engine: Engine, items: list[dict[str, str]], sampling: Sampling, kill_after: int | None
) -> tuple[dict[int, Answer], float]:
    """Return the answers by place, and the seconds from the first prompt to the last answer."""
    prompts = (engine.render(item["instruction"], item.get("input") or "", "system1") for item in items)
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
