"""Running a config: the built-in trainer or the real EasyDistill, always as a child process.

EasyDistill 1.0 exits 0 when it failed, so success is judged by the checkpoint that it leaves.
"""

import os
import sys
from pathlib import Path
from typing import Any

from distill_app.core.errors import TrainingError
from distill_app.core.files import read_json, save_json, save_text
from distill_app.easydistill.child import run_child
from distill_app.easydistill.job import Job, LabelingJob, read_job
from distill_app.easydistill.launch import OURS, launcher
from distill_app.easydistill.real import VENV, find_program, refusal, run_real

# Of glibc's malloc, read when a process starts: what a training step frees goes back to the system and not
# to pieces, and comes in pages of 2 MB. Measured on a 135M student: 3.1 GB at most in place of 3.5, and a
# sixth less time.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def run_easy_distill(config_path: str, backend: str | None = None) -> int:
    """Run a training config in a child process; return 0 if a whole checkpoint came out of it.

    Args:
        backend: "easydistill" (the real one: on PATH, else of `make easydistill`), "builtin" (ours), or
            None for the config's own `backend`, else EasyDistill where it is installed and can do the job.

    Returns:
        0, or the child's exit code, or 1 where EasyDistill said 0 but left no loadable checkpoint. The cause
        is printed to stderr.
    """
    try:
        job = read_job(config_path)
        if choose_backend(job, backend) == "builtin":
            _run_builtin(job)
        else:
            run_real(job)
    except TrainingError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    except (ValueError, OSError) as err:
        said = str(err)
        place = "" if said.startswith(f"{config_path}: ") else f"{config_path}: "
        print(f"error: {place}{said}", file=sys.stderr)
        return 1
    return 0


def choose_backend(job: Job, backend: str | None) -> str:
    """Return "builtin" or "easydistill": what is asked for, else the config's, else what is installed."""
    program = find_program()
    fits = program is not None and refusal(job) is None
    chosen = backend or job.backend or ("easydistill" if fits else "builtin")
    if chosen not in ("builtin", "easydistill"):
        raise ValueError(f'backend: found "{chosen}", expected "builtin" or "easydistill"')
    if chosen == "easydistill" and program is None:
        raise ValueError(
            f"backend easydistill: no such command on PATH or in {VENV}; run `make easydistill` (the package"
            ' of that name on PyPI is an empty placeholder) or use "builtin"'
        )
    return chosen


def _run_builtin(job: Job) -> None:
    """Label what is lacking, then run our trainer, which puts its checkpoint in place whole or not at all."""
    command = [*launcher(job), "-m", "distill_app.training", "--config", job.path]
    _run([*command, *_label_lacking(job)])


def named_inputs(config_path: str) -> list[tuple[str, str]]:
    """Return key and path, or Hub id, of what a training by this config opens; a teacher is none of it.

    Raises:
        FileNotFoundError, ValueError: the config is missing or malformed.
    """
    job = read_job(config_path)
    paths = ("labeled_path", "instruction_path", "logits_path", "template")
    found = {f"dataset.{key}": getattr(job.dataset, key) for key in paths}
    found["accelerate"] = None if job.accelerate in OURS else job.accelerate
    return [*((key, path) for key, path in found.items() if path), ("models.student", job.models.student)]


def _label_lacking(job: Job) -> list[str]:
    """Label, for a job that labels, what `labeled_path` lacks; return the trainer's options to read that.

    The labels go into a file of ours under work/: `labeled_path` is never written. Where the instructions are
    the labelled file itself, nothing can be lacking.
    """
    if not isinstance(job, LabelingJob):
        return []
    instructions, there = job.dataset.instruction_path, job.dataset.labeled_path
    lacking = instructions and Path(instructions).is_file() and instructions != there
    if not job.is_white_box and not lacking and Path(there).is_file():
        return []
    place = Path("work") / Path(job.output_dir).name
    labeled, logits = f"{place}_labeled.json", f"{place}_logits.arrow"
    options = ["--logits-out", logits] if job.is_white_box else []
    # What the trainer would refuse is told before the teacher is asked
    _run([sys.executable, "-m", "distill_app.training", "--config", job.path, "--check"])
    module = "distill_app.labeling"  # a command of its own: training does not depend on labelling's code
    _run([sys.executable, "-m", module, "--config", job.path, "--out", labeled, *options])
    return ["--data", labeled, *(["--logits", logits] if job.is_white_box else [])]


def _run(command: list[str]) -> None:
    code = run_child(command, {**ALLOCATOR, **os.environ}).code
    if code != 0:
        raise TrainingError(f"{' '.join(command)}: exit code {code}", code)


def train_with_config(config_path: str, metrics_path: str) -> dict[str, Any]:
    """Train as the config says; copy the metrics, and the loss curves beside them; return the metrics.

    `metrics/train_s1.json` gets `metrics/train_s1_loss.csv` and `metrics/train_s1_validation.csv` (step,
    loss). EasyDistill's own trainer leaves none of them in its checkpoint: then they are empty.

    Raises:
        TrainingError: the training failed; nothing new is in the output folder.
    """
    output_dir = Path(read_job(config_path).output_dir)
    code = run_easy_distill(config_path)
    if code != 0:
        raise TrainingError(f"{config_path}: training failed with exit code {code}; the cause is above")
    for name in ("loss", "validation"):
        curve = output_dir / f"{name}.csv"
        text = curve.read_text(encoding="utf-8") if curve.is_file() else "step,loss\n"
        save_text(f"{Path(metrics_path).with_suffix('')}_{name}.csv", text)
    found = output_dir / "metrics.json"
    metrics: dict[str, Any] = read_json(found) if found.is_file() else {}
    save_json(metrics_path, metrics)
    return metrics
