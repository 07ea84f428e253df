"""A copy of this project with tiny models, for tests that run the real `dvc repro`."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PARTS = (
    "distill_app",
    "stages",
    "data/sample",
    "data/tasks",
    "profiles",
    "dvc.yaml",
    ".dvcignore",
    ".gitignore",
)


def copy_parts(folder: Path, parts: Iterable[str] = PARTS) -> None:
    """Copy code and sample data into `folder`."""
    for part in parts:
        source, target = ROOT / part, folder / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)


def make_project(folder: Path, tiny_model: Path) -> Path:
    """Copy code and sample data into `folder`, with params for a tiny teacher, under git and DVC."""
    copy_parts(folder)
    shutil.copytree(tiny_model, folder / "tiny")
    graph = folder / "dvc.yaml"
    graph.write_text(
        graph.read_text().replace("      - distill_app/base\n", "      - distill_app/base\n      - tiny\n", 1)
    )
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["base_models"].update(teacher="tiny", system1_layers=3, system2_layers=4)
    params["prepare_s1"].update(slice="train[:40]", heldout_fraction=0.2)
    params["prepare_s2"].update(slice="train[:40]", heldout_fraction=0.2)
    params["label"].update(max_new_tokens=8, on_truncated="keep", temperature=1.0)
    params["measure"].update(
        instruction_prompts=4,
        reasoning_prompts=4,
        max_new_tokens=6,
        fidelity_prompts=3,
        timed_prompts=1,
        load_prompts=2,
        timed_tokens=2,
        timed_rounds=2,
    )
    params["benchmark"].update(tasks=[])
    for system in ("train_s1", "train_s2"):
        params[system].update(batch_size=8, max_length=2048)
    save_params(folder, params)
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, cwd=folder, check=True)
    dvc(folder, "init", "-q")
    dvc(folder, "config", "core.analytics", "false")
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "start"], cwd=folder, check=True
    )
    return folder


def save_params(folder: Path, params: dict) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def change_param(folder: Path, section: str, **values: object) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params[section].update(values)
    save_params(folder, params)


def dvc(folder: Path, *arguments: str, ok: bool = True) -> str:
    """Run dvc in `folder` with this Python first on PATH; return stdout and stderr."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True, env=environment
    )
    assert (run.returncode == 0) == ok, run.stdout + run.stderr
    return run.stdout + run.stderr


def stages_run(output: str) -> set[str]:
    return set(re.findall(r"Running stage '(\w+)'", output))
