"""Stages that end badly: in one line, with nothing half-written and no process left behind."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commandline import heed_interrupts

from distill_app import save_json, write_system1_config
from distill_app.core.stage import one_line, report_errors

CHILD = "import sys, time; from distill_app.core.stage import run_stage; run_stage(lambda: (print('up', flush=True), time.sleep(60)))"


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_stage_says_so_in_one_line(sent):
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(sent)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.startswith("interrupted; nothing half-written is left") and err.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_stage_ends_when_its_parent_is_killed():
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {CHILD!r}], stdout=subprocess.PIPE);"
            "p.stdout.readline(); print(p.pid, flush=True); p.wait()",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not is_running(child))


@pytest.mark.slow
def test_an_interrupted_training_leaves_no_folder_and_no_trainer(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = [{"instruction": f"Say {n}.", "input": "", "output": "yes " * 40} for n in range(64)]
    save_json("d.json", records)
    write_system1_config(
        "c.json",
        student_model=str(tiny_model_dir),
        labeled_path="d.json",
        out_dir="models/out",
        num_epochs=10_000,
        backend="builtin",
        training={"save_steps": 1},
        extra={"validation": {"fraction": 0.1}},  # an evaluation is told at once, a step after ten seconds
    )
    code = "from distill_app import run_easy_distill; run_easy_distill('c.json')"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    for line in process.stderr:
        if "step" in line:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    process.communicate(timeout=30)
    assert children and wait_until(lambda: not any(is_running(int(pid)) for pid in children))
    assert not Path("models").exists() or list(Path("models").iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    assert report_errors(lambda: save_json(tmp_path / "x.json", [1])) == 1
    assert "no space left on device; free some space" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_defect_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        report_errors(lambda: 1 / 0)


def test_a_long_error_becomes_one_line():
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
