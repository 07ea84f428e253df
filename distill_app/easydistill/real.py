"""The real EasyDistill 1.0: a scratch copy for it to work on, its launch, and what to make of what it leaves.

Its command starts `accelerate` with a launch file that asks for eight processes with DeepSpeed, one a GPU,
and exits with 0 whatever happens. What it starts is `kd/train.py`, a plain script on transformers' Trainer
that takes the same config. So where there are fewer GPUs than its launch file asks for, that script is run
by itself, by the same Python, in one process: EasyDistill's training without its launcher. The same where
DeepSpeed is not installed.

Source: EasyDistill v1.0.0, easydistill/cli.py and easydistill/kd/train.py.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distill_app.core.errors import TrainingError
from distill_app.core.files import new_folder, save_json, save_text
from distill_app.core.models import (
    check_checkpoint,
    check_local,
    is_local_path,
    load_trainable,
    save_checkpoint,
)
from distill_app.core.prompts import chat_template, user_content
from distill_app.core.stage import one_line
from distill_app.easydistill.causes import LAUNCH_FILE, bare, explain
from distill_app.easydistill.child import Finished, run_child
from distill_app.easydistill.job import Job, Models, at_commit, read_labeled
from distill_app.report.cards.card import training_card
from distill_app.report.cards.origin import copy_license, made_from, with_licences

VENV = ".venv-easydistill"  # of `make easydistill`, in the current folder
BLACK_BOX_JOBS = ("kd_black_box_local", "kd_black_box_api", "kd_black_box_train_only")
TAIL_LINES = 15
HELP_SEC = 300  # for a wrapper whose container must first be fetched
WANTED = (
    "expected EasyDistill 1.0 (2.x only builds data, the package on PyPI is an empty placeholder), or a"
    " script that passes its arguments on to it; take it off PATH and run `make easydistill`"
)
TRAINING_DEFAULTS = {  # no progress bars in logs, no reports to the net, no rests for a resume that it lacks
    "disable_tqdm": True,
    "report_to": "none",
    "save_only_model": True,
    "save_total_limit": 1,
}


@dataclass(frozen=True)
class Installed:
    """An EasyDistill 1.0, as its own Python describes it; `path` is the PATH that its command needs."""

    program: str
    python: str
    path: str
    folder: Path
    gpus: int
    has_deepspeed: bool
    training_keys: frozenset[str]

    @property
    def launch_file(self) -> Path:
        """Accelerate's config; only a clone has it, an installed copy of the package does not."""
        return self.folder.parent / LAUNCH_FILE


@dataclass(frozen=True)
class Wrapper:
    """A command that passes its arguments on to an EasyDistill 1.0 elsewhere, in a container for example.

    What is there cannot be asked: neither the fields of its TRL nor its GPUs, and its trainer alone cannot be
    started. It must see the project's folder under the same path.
    """

    program: str


def find_program() -> str | None:
    """Return the command `easydistill`: the one on PATH, else that of `make easydistill`, else None."""
    own = Path(VENV, "bin", "easydistill").absolute()
    return shutil.which("easydistill") or (str(own) if own.is_file() else None)


def refusal(job: Job) -> str | None:
    """Return in one line what the job asks for that EasyDistill 1.0 cannot do, None if it can all."""
    if job.is_white_box:
        return (
            f"job_type: found {job.job_type}, where EasyDistill 1.0 learns from misplaced logits; expected"
            f' one of {", ".join(BLACK_BOX_JOBS)}, or set backend to "builtin"'
        )
    asked = {
        "lora": job.lora,
        "accelerate": job.accelerate,
        "models.quantization": job.models.quantization != "none",
    }
    for key, value in asked.items():
        if value:
            return f'{key}: EasyDistill 1.0 does not know it; remove it or set backend to "builtin"'
    return None


def run_real(job: Job) -> None:
    """Run EasyDistill 1.0 in a scratch folder; judge, finish and put in place the student that it leaves.

    The student is saved as ours are: bfloat16, the prompt's template in it, card and `loss.csv` beside it.

    Raises:
        ValueError, FileNotFoundError: the config or its files cannot be trained on.
        TrainingError: EasyDistill is not 1.0 or it failed; the cause, and its last lines.
    """
    if reason := refusal(job):
        raise ValueError(f"{job.path}: {reason}")
    if job.validation.fraction:
        print("easydistill: validation: unknown to it; it trains on all records", file=sys.stderr)
    template = _read_template(job.dataset.template)
    job = at_commit(job)
    found = _look_at(str(find_program()))
    # What a container wrote may be another user's
    with tempfile.TemporaryDirectory(
        prefix="easydistill-", dir=_scratch_parent(found), ignore_cleanup_errors=True
    ) as folder:
        scratch = Path(folder)
        config_path = _isolated_config(job, template, found, scratch)
        command, environment = _launch(found, config_path)
        environment |= {"HF_DATASETS_CACHE": str(scratch / "cache"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        finished = run_child(command, environment, scratch if isinstance(found, Installed) else None)
        _finish(finished, scratch / "out", template, job)


def _scratch_parent(found: Installed | Wrapper) -> str:
    """Return where the scratch folder can lie; a container is most often given the project alone."""
    place = Path("work").absolute()
    if isinstance(found, Installed) or " " in str(place):
        return _folder_without_space()
    place.mkdir(exist_ok=True)
    return str(place)


def _folder_without_space() -> str:
    """Return a folder for temporary files: EasyDistill 1.0 joins paths into shell commands."""
    for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if " " not in folder and os.access(folder, os.W_OK):
            return folder
    raise ValueError(
        f"TMPDIR: found {tempfile.gettempdir()}, a path with a space, which EasyDistill 1.0 cannot take;"
        " set it to a folder without one"
    )


def _read_template(path: str | None) -> str:
    """Return the config's template; without one, ours for System 1."""
    if not path:
        return chat_template("system1")
    if not Path(path).is_file():
        raise FileNotFoundError(f"dataset.template: {path}: no such file; fix the path")
    return Path(path).read_text(encoding="utf-8")


def _look_at(program: str) -> Installed | Wrapper:
    """Ask the Python that the command would start (a bare `python`, its own folder first) what it has.

    Where that Python has no such package the command may be a wrapper, whose own words must do.

    Raises:
        TrainingError: it is not EasyDistill 1.0, or its trainer's imports fail.
    """
    path = f"{Path(program).resolve().parent}{os.pathsep}{os.environ.get('PATH', '')}"
    python = shutil.which("python", path=path) or sys.executable
    probe = Path(__file__).with_name("probe.py").read_text(encoding="utf-8")
    answer = subprocess.run(
        [python, "-c", probe], cwd="/", env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or ["no output"])[-1]
        raise TrainingError(
            f"{program}: its Python, {python}, cannot import what EasyDistill 1.0's trainer needs ({last});"
            " install that, or build a whole environment with `make easydistill`"
        )
    found = json.loads(answer.stdout.splitlines()[-1])
    if not found:
        return _wrapper(program, python)
    if "training_keys" not in found:
        raise TrainingError(f"{program}: found version {found['version']} without a trainer, {WANTED}")
    return Installed(
        program,
        python,
        path,
        folder=Path(found["folder"]),
        gpus=found["gpus"],
        has_deepspeed=found["deepspeed"],
        training_keys=frozenset(found["training_keys"]),
    )


def _wrapper(program: str, python: str) -> Wrapper:
    """Return the command as a wrapper, if its help is that of EasyDistill 1.0.

    Raises:
        TrainingError: it is not.
    """
    try:
        answer = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=HELP_SEC)
        said, code = answer.stdout + answer.stderr, str(answer.returncode)
    except (OSError, subprocess.TimeoutExpired) as err:
        said, code = "", one_line(err)
    if "--list-jobs" in said:
        raise TrainingError(f"{program}: found version 2 without a trainer, {WANTED}")
    if code != "0" or "--config" not in said:
        last = (said.strip().splitlines() or [code])[-1]
        raise TrainingError(
            f"{program}: found no such package in {python}, and `easydistill --help` names no --config"
            f" ({last}), {WANTED}"
        )
    print(
        f"easydistill: {program} is a wrapper: what is behind it cannot be checked (its version, TRL and"
        f" GPUs); it must see {Path.cwd()} under that path",
        file=sys.stderr,
    )
    return Wrapper(program)


def _isolated_config(job: Job, template: str, found: Installed | Wrapper, scratch: Path) -> str:
    """Write a config that EasyDistill 1.0 can harm nobody with; return its absolute path.

    It reads paths against its own package, breaks at spaces in them, would label again and overwrite
    `labeled_path`, and ignores `input`: so it gets a train-only job whose every path lies in the scratch
    folder, and a copy of the data with `input` folded in. Our own keys stay out.
    """
    records = read_labeled(job.dataset.labeled_path)
    folded = [
        {"instruction": user_content(r["instruction"], r["input"]), "output": r["output"]} for r in records
    ]
    save_json(scratch / "labeled.json", folded)
    save_text(scratch / "template.jinja", template)
    isolated = {
        "job_type": "kd_black_box_train_only",
        "dataset": {
            "labeled_path": str(scratch / "labeled.json"),
            "template": str(scratch / "template.jinja"),
            "seed": job.dataset.seed,
        },
        "models": {"student": _student(job.models, found, scratch)},
        "training": _training(job.training, found, scratch),
    }
    save_json(scratch / "config.json", isolated)
    return str(scratch / "config.json")


def _student(models: Models, found: Installed | Wrapper, scratch: Path) -> str:
    """Return the student's Hub id, or the path of a link to its folder; pinned, to its snapshot.

    A wrapper may see the project alone, so it gets a copy of a snapshot.
    """
    student, revision = models.student, models.student_revision
    check_local(student)
    if revision and not is_local_path(student):  # EasyDistill itself reads main alone
        from huggingface_hub import snapshot_download

        student = snapshot_download(student, revision=revision)
        if isinstance(found, Wrapper):
            return str(shutil.copytree(student, scratch / "student"))
    if not Path(student).is_dir():
        return student
    (scratch / "student").symlink_to(os.path.abspath(student))
    return str(scratch / "student")


def _training(options: dict[str, Any], found: Installed | Wrapper, scratch: Path) -> dict[str, Any]:
    """Return the SFTConfig fields for its TRL; a key that is too new for it is told and left out."""
    asked = {**TRAINING_DEFAULTS, **options, "output_dir": str(scratch / "out")}
    if isinstance(found, Wrapper):
        return asked
    for key in options:
        if key not in found.training_keys:
            print(f"easydistill: training.{key}: unknown to its TRL; left out", file=sys.stderr)
    return {key: value for key, value in asked.items() if key in found.training_keys}


def _launch(found: Installed | Wrapper, config_path: str) -> tuple[list[str], dict[str, str]]:
    """Return command and environment: its own command where it can work, else its trainer alone.

    Each process takes a batch of the config's: eight of them take eight times as much a step as one does.
    """
    if isinstance(found, Wrapper):
        return [found.program, "--config", config_path], dict(os.environ)
    environment = {**os.environ, "PATH": found.path}
    reason = _why_alone(found)
    if reason is None:
        return [found.program, "--config", config_path], environment
    print(f"easydistill: {reason}; its trainer runs in one process", file=sys.stderr)
    # With more than one GPU in sight the Trainer would spread, and so multiply, each batch
    environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return [found.python, str(found.folder / "kd" / "train.py"), "--config", config_path], environment


def _why_alone(found: Installed) -> str | None:
    """Return why its launcher cannot work here; None if it can."""
    if not found.launch_file.is_file():
        return f"no launch file {found.launch_file}"
    if " " in str(found.folder):
        return f"its launcher cannot take the space in {found.folder}"
    launch = yaml.safe_load(found.launch_file.read_text(encoding="utf-8"))
    needed = 0 if launch.get("use_cpu") else launch.get("num_processes", 1)
    if needed > found.gpus:
        return f"its launch file asks for {needed} GPUs, found {found.gpus}"
    if launch.get("distributed_type") == "DEEPSPEED" and not found.has_deepspeed:
        return "its launch file asks for DeepSpeed, which is not installed in its environment"
    return None


def _finish(finished: Finished, out: Path, template: str, job: Job) -> None:
    """Save what EasyDistill left as a checkpoint of ours, or tell why it left none."""
    if finished.code != 0:
        raise _failure(finished, f"exit code {finished.code}")
    for line in finished.lines:
        if "Error processing sample" in line:  # it would train on an empty text in its place
            raise _failure(finished, f"a record that the template does not render ({bare(line)})")
    try:
        check_checkpoint(out)
        model, tokenizer = load_trainable(str(out), in_bfloat16=True)
    except (ValueError, OSError) as err:
        raise _failure(finished, f"exit code 0, but no checkpoint ({one_line(err)})") from err
    if "messages" in template:
        tokenizer.chat_template = template
    output_dir, student = job.output_dir, job.models.student
    with new_folder(output_dir) as part:
        save_checkpoint(model, tokenizer, part)
        save_text(part / "README.md", training_card(Path(output_dir).name, with_licences(_origin(job))))
        copy_license(student, part)
        save_text(part / "loss.csv", _loss_lines(out))


def _origin(job: Job) -> dict[str, Any]:
    """Return what the model card tells of a training."""
    return {
        "backend": "easydistill",
        "job_type": job.job_type,
        **made_from(
            job.models.student,
            job.models.teacher,
            job.dataset.labeled_path,
            job.source,
            job.models.student_revision,
            job.models.teacher_revision,
        ),
        "training": {key: value for key, value in job.training.items() if key != "output_dir"},
        "seed": job.dataset.seed,
    }


def _loss_lines(out: Path) -> str:
    """Return the loss curve as CSV, from the state that its Trainer keeps with its last checkpoint."""
    states = sorted(out.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    history = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"] if states else []
    return "\n".join(["step,loss", *(f"{e['step']},{e['loss']}" for e in history if "loss" in e)]) + "\n"


def _failure(finished: Finished, what: str) -> TrainingError:
    cause = explain(finished)
    last = "\n".join(finished.lines[-TAIL_LINES:])
    return TrainingError(
        f"easydistill: {what}{'; ' + cause if cause else ''}; it said:\n{last}", finished.code or 1
    )
