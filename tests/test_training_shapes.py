"""A real model's shape, with random weights, against the formula of what it takes; see benchmarks/shapes.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distill_app.easydistill.run import ALLOCATOR

ROOT = Path(__file__).parents[1]
SCRIPT = """
import json, sys
from shapes import run_shape
run = run_shape(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), 3, sys.argv[4:] == ["checkpointed"])
print(json.dumps(run.__dict__))
"""


def run_shape(shape, tokens, length, *options, allocator=ALLOCATOR):
    """Train three steps in a process of its own: its peak is the most that it ever had."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, shape, str(tokens), str(length), *options],
        capture_output=True,
        text=True,
        env={**allocator, "PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.full
@pytest.mark.parametrize("options", [(), ("checkpointed",)], ids=["plain", "checkpointed"])
def test_a_small_models_peak_is_that_of_the_formula(options):
    """In the proportions of Qwen2.5-0.5B, a row of one long example at a time; pages of 2 MB would tell."""
    small_pages = {key: value for key, value in ALLOCATOR.items() if key != "GLIBC_TUNABLES"}
    run = run_shape("qwen2.5-0.5b/16", 2048, 1024, *options, allocator=small_pages)
    assert run["tokens_a_second"] > 0 and 0 < run["share"] < 1
    assert 0.6 * run["expected_bytes"] < run["peak_bytes"] < 1.3 * run["expected_bytes"]


@pytest.mark.full
@pytest.mark.parametrize("length", [512, 4096])
def test_qwens_shape_trains_three_steps_of_4096_tokens_within_the_formula(length):
    """13 GB and some minutes."""
    run = run_shape("qwen2.5-0.5b", 4096, length)
    assert 0.8 * run["expected_bytes"] < run["peak_bytes"] < 1.15 * run["expected_bytes"]
