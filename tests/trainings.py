"""Small trainings of the tiny student, in this process or in one that is killed."""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from distill_app import write_system1_config
from distill_app.core.logits import About, TopRow, new_top_logits, tokenizer_digest
from distill_app.core.prompts import chat_template
from distill_app.training.examples import NO_LOSS, Example, Template, build_examples

RECORDS = [
    {
        "instruction": f"Name number {n}.",
        "input": "" if n % 2 else "quick",
        "output": f"It is {n}. " * (1 + n % 3),
    }
    for n in range(12)
]
OURS = Template(chat_template("system1"), chat_template("system1"))
OUT = "models/s1"
FORK_SEC = 120  # after which a fork that waits for another for ever is ended


def write_job(
    student: Any,
    records: Sequence[Mapping[str, str]] = RECORDS,
    name: str = "s1",
    sections: Mapping[str, Any] | None = None,
    **training: Any,
) -> str:
    """Write records and a config that trains on them into models/NAME; return the config's path.

    The config is of this machine's kind alone in `bf16`, which is false unless it is given.
    """
    Path("data").mkdir(exist_ok=True)
    Path("data/labeled.json").write_text(json.dumps(list(records)))
    options = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "bf16": False,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        **training,
    }
    return write_system1_config(
        config_path=f"configs/{name}.json",
        student_model=str(student),
        labeled_path="data/labeled.json",
        out_dir=f"models/{name}",
        num_epochs=options.pop("num_train_epochs", 2),
        training=options,
        backend="builtin",
        extra=sections,
    )


def train(config_path: str) -> str:
    """Train in this process; return the checkpoint's folder."""
    from distill_app.training.train import train_student

    return train_student(config_path)


def in_fork(call: Callable[[], Any], log: str = "fork.log", **environment: str) -> int:
    """Start a call in a fork of this process, its stderr in a file; return its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    signal.alarm(FORK_SEC)
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 2)
            sys.stderr = file
            os.environ |= environment
            try:
                call()
                code = 0
            except BaseException:
                traceback.print_exc(file=file)
    finally:
        os._exit(code)


def exit_code(pid: int) -> int:
    """Wait for a fork; return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def files_of(folder: str | Path) -> dict[str, bytes]:
    """Return a folder's files and what is in them."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def dtypes_of(folder: str | Path) -> set[torch.dtype]:
    """Return the types in which a checkpoint's weights are stored."""
    return {tensor.dtype for tensor in load_file(Path(folder) / "model.safetensors").values()}


def curve(folder: str | Path, name: str = "loss") -> list[tuple[int, float]]:
    """Return the points of a written loss curve."""
    lines = (Path(folder) / f"{name}.csv").read_text().split()
    assert lines[0] == "step,loss"
    return [(int(step), float(loss)) for step, loss in (line.split(",") for line in lines[1:])]


def response_of(example: Example) -> list[int]:
    """Return the tokens that are learned."""
    return [label for label in example.labels if label != NO_LOSS]


def reference_loss(model: Any, examples: Sequence[Example]) -> float:
    """Return the loss a token in float64 over one example after the other."""
    import torch

    total = count = 0.0
    with torch.no_grad():
        for example in examples:
            scores = model(input_ids=torch.tensor([example.input_ids])).logits[0].double().log_softmax(-1)
            for place, label in enumerate(example.labels):
                if label != NO_LOSS:
                    total -= scores[place - 1, label].item()
                    count += 1
    return total / count


def write_teacher(
    path: str,
    tokenizer: Any,
    records: Sequence[Mapping[str, str]],
    distribution: Callable[[int, Example], np.ndarray],
    top: int = 8,
    vocab_size: int | None = None,
) -> str:
    """Write the distributions of a teacher over the records' answers.

    Args:
        distribution: of a record's number and example, `(answer's tokens, vocabulary)` log-probabilities
            in float64.
    """
    examples = build_examples(records, tokenizer, OURS).train
    vocab_size = vocab_size or len(tokenizer)
    about = About(top, vocab_size, tokenizer_digest(tokenizer), "tiny")
    with new_top_logits(path, about) as add:
        for example in examples:
            logs = distribution(example.row, example)
            ids = np.argsort(-logs, axis=1, kind="stable")[:, :top]
            likeliest = np.take_along_axis(logs, ids, 1)
            beyond = 1 - np.exp(likeliest).sum(1)
            tail = np.log(np.maximum(beyond, 1e-13))
            add(TopRow(np.array(response_of(example), np.int32), ids.astype(np.int32), likeliest, tail))
    return path


def dies_at(monkeypatch, module, name, count, after=True):
    """Have a function or method end its process at its n-th call."""
    real = getattr(module, name)
    calls = []

    def deadly(*args, **kwargs):
        calls.append(name)
        if len(calls) == count and not after:
            die()
        found = real(*args, **kwargs)
        if len(calls) == count:
            die()
        return found

    monkeypatch.setattr(module, name, deadly)
