"""Running a config: the built-in trainer or the real EasyDistill, always as a child process.

EasyDistill 1.0 exits 0 when it failed, so success is judged by the checkpoint that it leaves.
"""

import os
import sys
from pathlib import Path
from typing import Any

from distill_app.core.errors import TrainingError
from distill_app.core.files import read_json, save_json, save_text
from distill_app.core.jobs import LABELLING_JOBS
from distill_app.core.models import check_checkpoint
from distill_app.easydistill.child import run_child
from distill_app.easydistill.real import VENV, find_program, refusal, run_real

# Of glibc's malloc, read when a process starts: what a training step frees goes back to the system and not
# to pieces. Measured on a 135M student: 3.1 GB at most in place of 3.5, at the same speed.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}


def run_easy_distill(config_path: str, backend: str | None = None) -> int:
    """Run a training config in a child process; return 0 if a whole checkpoint came out of it.

    Args:
        backend: "easydistill" (the real one: on PATH, else of `make easydistill`), "builtin" (ours), or
            None for the config's own `backend`, else EasyDistill where it is installed and can do the job.

    Returns:
        0, or the child's exit code, or 1 where the child said 0 but left no loadable checkpoint. The cause
        is printed to stderr.
    """
    try:
        config = _read_config(config_path)
        if choose_backend(config, backend) == "builtin":
            _run_builtin(config_path, config)
        else:
            run_real(config)
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
    program = find_program()
    fits = program is not None and refusal(config) is None
    chosen = backend or config.get("backend") or ("easydistill" if fits else "builtin")
    if chosen not in ("builtin", "easydistill"):
        raise ValueError(f'backend: found "{chosen}", expected "builtin" or "easydistill"')
    if chosen == "easydistill" and program is None:
        raise ValueError(
            f"backend easydistill: no such command on PATH or in {VENV}; run `make easydistill` (the package"
            ' of that name on PyPI is an empty placeholder) or use "builtin"'
        )
    return chosen


def _run_builtin(config_path: str, config: dict[str, Any]) -> None:
    """Label what is lacking, then run our trainer, which puts its checkpoint in place whole or not at all."""
    command = [*_launcher(config), "-m", "distill_app.training", "--config", str(config_path)]
    _run([*command, *_label_lacking(config_path, config)])
    check_checkpoint(config["training"]["output_dir"])


def _launcher(config: dict[str, Any]) -> list[str]:
    """Return what starts a module: this Python, or accelerate with a config for several devices."""
    name = config.get("accelerate")
    if not name:
        return [sys.executable]
    own = Path(__file__).with_name("accelerate") / f"{name}.yaml"
    path = own if own.is_file() else Path(name)
    if not path.is_file():
        raise ValueError(
            f"accelerate: {name}: no such file; expected ddp, fsdp or an accelerate config's path"
        )
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]


def _label_lacking(config_path: str, config: dict[str, Any]) -> list[str]:
    """Label, for a job that labels, what `labeled_path` lacks; return the trainer's options to read that.

    The labels go into a file of ours under work/: `labeled_path` is never written. Where the instructions are
    the labelled file itself, nothing can be lacking.
    """
    job, dataset = config.get("job_type"), config["dataset"]
    instructions = dataset.get("instruction_path")
    if job not in LABELLING_JOBS:
        return []
    only_words = job != "kd_white_box"
    lacking = instructions and Path(instructions).is_file() and instructions != dataset["labeled_path"]
    if only_words and not lacking and Path(dataset["labeled_path"]).is_file():
        return []
    place = Path("work") / Path(config["training"]["output_dir"]).name
    labeled, logits = f"{place}_labeled.json", f"{place}_logits.arrow"
    options = [] if only_words else ["--logits-out", logits]
    module = "distill_app.labeling"  # a command of its own: training does not depend on labelling's code
    _run([sys.executable, "-m", module, "--config", str(config_path), "--out", labeled, *options])
    return ["--data", labeled] + ([] if only_words else ["--logits", logits])


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
    output_dir = Path(_read_config(config_path)["training"]["output_dir"])
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
