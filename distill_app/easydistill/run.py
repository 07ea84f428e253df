"""Running a config: the built-in trainer or the real EasyDistill, always as a child process.

EasyDistill 1.0 exits 0 when it failed, so success is judged by what lies in `training.output_dir`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

from distill_app.core.files import read_json, read_records, save_json, save_text
from distill_app.core.models import check_checkpoint
from distill_app.core.prompts import user_content

TAIL_LINES = 15


def run_easy_distill(config_path: str, backend: str | None = None) -> int:
    """Run a training config in a child process; return 0 if a whole checkpoint came out of it.

    Args:
        backend: "easydistill" (the command on PATH), "builtin" (ours), or None for the config's own
            `backend`, else EasyDistill where it is installed.

    Returns:
        0, or the child's exit code, or 1 where the child said 0 but left no loadable checkpoint. The cause
        is printed to stderr.
    """
    try:
        config = read_json(config_path)
        backend = choose_backend(config, backend)
        if backend == "builtin":
            command = [sys.executable, "-m", "distill_app.training", "--config", str(config_path)]
            return _run(command, config["training"]["output_dir"])
        with tempfile.TemporaryDirectory(prefix="easydistill-") as scratch:
            scratch_config = _isolated_config(config, Path(scratch))
            return _run(["easydistill", "--config", scratch_config], config["training"]["output_dir"])
    except (ValueError, OSError, KeyError, TypeError) as err:
        print(
            f"error: {config_path}: {err!r}" if isinstance(err, KeyError) else f"error: {err}",
            file=sys.stderr,
        )
        return 1


def choose_backend(config: dict[str, Any], backend: str | None) -> str:
    """Return "builtin" or "easydistill": what is asked for, else the config's, else what is installed."""
    installed = shutil.which("easydistill") is not None
    chosen = backend or config.get("backend") or ("easydistill" if installed else "builtin")
    if chosen not in ("builtin", "easydistill"):
        raise ValueError(f'backend: found "{chosen}", expected "builtin" or "easydistill"')
    if chosen == "easydistill" and not installed:
        raise ValueError(
            "backend easydistill: no such command on PATH; install EasyDistill 1.0 (see the README)"
            ' or use "builtin"'
        )
    return chosen


def _run(command: list[str], output_dir: str) -> int:
    """Run the child, its output shown as it comes; return its verdict as `run_easy_distill` does."""
    started = time.time()
    code, tail = _stream(command)
    if code != 0:
        print(f"error: {' '.join(command)}: exit code {code}", file=sys.stderr)
        return code
    try:
        check_checkpoint(output_dir)
        newest = max(path.stat().st_mtime for path in Path(output_dir).glob("*.safetensors"))
        if newest < started - 1:  # file clocks may lag a little behind ours
            raise ValueError(f"{output_dir}: the weights are older than this run")
    except (ValueError, OSError) as err:
        last = "\n".join(tail)
        print(
            f"{last}\nerror: {' '.join(command)}: exit code 0, but no new checkpoint: {err}",
            file=sys.stderr,
        )
        return 1
    return 0


def _stream(command: list[str]) -> tuple[int, deque[str]]:
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
        errors="replace",
    )
    try:
        for line in process.stdout or ():
            tail.append(line.rstrip())
            print(line, end="", file=sys.stderr, flush=True)
        return process.wait(), tail
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _isolated_config(config: dict[str, Any], scratch: Path) -> str:
    """Write a copy of the config that EasyDistill 1.0 can harm nobody with; return its absolute path.

    It reads paths against its own package, would label again and overwrite `labeled_path`, and ignores
    `input`: so it gets absolute paths, a train-only job, and a scratch copy with `input` folded in.
    """
    records = read_records(config["dataset"]["labeled_path"])
    folded = [
        {"instruction": user_content(r["instruction"], r["input"]), "output": r["output"]} for r in records
    ]
    save_json(scratch / "labeled.json", folded)
    student = config["models"]["student"]
    isolated = {
        **config,
        "job_type": "kd_black_box_train_only",
        "dataset": {
            **config["dataset"],
            "labeled_path": str(scratch / "labeled.json"),
            "template": os.path.abspath(config["dataset"]["template"]),
        },
        "models": {"student": os.path.abspath(student) if Path(student).is_dir() else student},
        "training": {
            **config["training"],
            "output_dir": os.path.abspath(config["training"]["output_dir"]),
        },
    }
    path = scratch / "config.json"
    save_json(path, isolated)
    return str(path)


def train_with_config(config_path: str, loss_path: str) -> float:
    """Train as the config says, copy the loss curve to `loss_path`; return the last loss.

    Raises:
        RuntimeError: the training failed; nothing is left in the output folder.
    """
    output_dir = Path(read_json(config_path)["training"]["output_dir"])
    code = run_easy_distill(config_path)
    if code != 0:
        shutil.rmtree(output_dir, ignore_errors=True)
        raise RuntimeError(f"{config_path}: training failed with exit code {code}; the cause is above")
    curve = _loss_curve(output_dir)
    save_text(loss_path, "\n".join(["step,loss", *(f"{s},{v}" for s, v in curve)]) + "\n")
    return curve[-1][1] if curve else float("nan")


def _loss_curve(output_dir: Path) -> list[tuple[int, float]]:
    """Return (step, loss) points: ours from loss.csv; EasyDistill's trainer keeps none in the outcome."""
    path = output_dir / "loss.csv"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [(int(step), float(loss)) for step, loss in (line.split(",") for line in lines)]
