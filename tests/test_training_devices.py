"""Trainer and engine on a device that is not the CPU; see rehearse_device.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def rehearse(folder, *parts):
    """Run a rehearsal in a process of its own."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(HERE / "rehearse_device.py"), *parts],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", ["varlen", "masked", "blocks", "checkpointed", "engine"])
def test_on_another_device_all_is_as_on_the_cpu(tmp_path, part):
    done = rehearse(tmp_path, part)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "fault"),
    [("varlen", "batch"), ("varlen", "ends"), ("blocks", "mask"), ("engine", "slots"), ("engine", "ids")],
)
def test_a_tensor_left_on_the_cpu_is_found(tmp_path, part, fault):
    done = rehearse(tmp_path, part, fault)
    assert done.returncode != 0
    assert "expected all tensors to be on the same device" in done.stderr, done.stderr[-3000:]
