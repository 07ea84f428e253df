"""Running a config: the built-in trainer or the real EasyDistill, always as a child process.

EasyDistill 1.0 exits 0 when it failed, so success is judged by the checkpoint that it leaves.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

from distill_app.core.errors import TrainingError
from distill_app.core.files import new_folder, read_json, read_records, save_json, save_text
from distill_app.core.models import check_checkpoint, set_chat_template
from distill_app.core.prompts import user_content
from distill_app.core.stage import die_with_parent

TAIL_LINES = 15
GRACE_SEC = 10  # between asking a trainer to end and ending it


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
        config = _read_config(config_path)
        if choose_backend(config, backend) == "builtin":
            _run_builtin(config_path, config["training"]["output_dir"])
        else:
            _run_real(config)
    except TrainingError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    except (ValueError, OSError) as err:
        print(f"error: {config_path}: {err}", file=sys.stderr)
        return 1
    return 0


def _read_config(path: str) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"found {type(config).__name__}, expected an object")
    for section, key in (("dataset", "labeled_path"), ("models", "student"), ("training", "output_dir")):
        if not isinstance(config.get(section), dict) or not config[section].get(key):
            raise ValueError(f"{section}.{key}: missing; add it")
    return config


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


def _run_builtin(config_path: str, output_dir: str) -> None:
    """Run our trainer, which puts its checkpoint in place itself, whole or not at all."""
    command = [sys.executable, "-m", "distill_app.training", "--config", str(config_path)]
    _run(command, dict(os.environ))
    check_checkpoint(output_dir)


def _run_real(config: dict[str, Any]) -> None:
    """Run EasyDistill 1.0 in a scratch folder, judge its checkpoint, finish it and put it in place."""
    program = str(shutil.which("easydistill"))
    # It starts a bare `accelerate`: that must be its own environment's, not ours.
    path = f"{Path(program).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with tempfile.TemporaryDirectory(prefix="easydistill-") as folder:
        scratch = Path(folder)
        command = [program, "--config", _isolated_config(config, scratch)]
        tail = _run(command, {**os.environ, "PATH": path})
        try:
            check_checkpoint(scratch / "out")
        except (ValueError, OSError) as err:
            last = "\n".join(tail)
            raise TrainingError(
                f"easydistill: exit code 0, but no checkpoint ({err}); it said:\n{last}"
            ) from err
        template = Path(config["dataset"]["template"]).read_text(encoding="utf-8")
        if "messages" in template:
            set_chat_template(scratch / "out", template)
        with new_folder(config["training"]["output_dir"]) as part:
            shutil.copytree(scratch / "out", part, dirs_exist_ok=True)


def _run(command: list[str], environment: dict[str, str]) -> list[str]:
    """Run the child in a session of its own, its output shown as it comes; return its last lines.

    Whatever ends us ends the child and all that it started. Against SIGKILL of ours only the child
    itself is covered (Linux).

    Raises:
        TrainingError: the exit code is not 0.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    try:
        for line in process.stdout or ():
            tail.append(line.rstrip())
            print(line, end="", file=sys.stderr, flush=True)
        code = process.wait()
    finally:
        _end_session(process)
    if code != 0:
        raise TrainingError(f"{' '.join(command)}: exit code {code}", code)
    return list(tail)


def _end_session(process: subprocess.Popen[str]) -> None:
    """End what still runs of a child's session, politely first."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(timeout=GRACE_SEC)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


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
    student = os.path.abspath(student) if Path(student).is_dir() else student
    template = os.path.abspath(config["dataset"]["template"])
    for path in (str(scratch), student, template):
        if " " in path:
            raise ValueError(f"EasyDistill 1.0 cannot take a path with a space: {path}; move it")
    isolated = {
        **config,
        "job_type": "kd_black_box_train_only",
        "dataset": {
            **config["dataset"],
            "labeled_path": str(scratch / "labeled.json"),
            "template": template,
        },
        "models": {"student": student},
        "training": {**config["training"], "output_dir": str(scratch / "out")},
    }
    path = scratch / "config.json"
    save_json(path, isolated)
    return str(path)


def train_with_config(config_path: str, loss_path: str) -> float:
    """Train as the config says, copy the loss curve to `loss_path`; return the last loss.

    Raises:
        TrainingError: the training failed; nothing new is in the output folder.
    """
    output_dir = Path(_read_config(config_path)["training"]["output_dir"])
    code = run_easy_distill(config_path)
    if code != 0:
        raise TrainingError(f"{config_path}: training failed with exit code {code}; the cause is above")
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
