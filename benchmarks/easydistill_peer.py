"""Times EasyDistill 1.0's trainer, the peer of ours, in one process; prints one line of JSON.

Runs in .venv-easydistill: python benchmarks/easydistill_peer.py --config FILE

FILE is an EasyDistill 1.0 config with absolute paths; its `output_dir` is written. The line:
    tokens        in its rendered texts as it trains on them (EOS added, cut at max_length), all epochs
    seconds       its own train_runtime: no imports, loading or tokenizing, but the checkpoints that it saves
                  on the way (training.save_strategy "no" saves none)
    peak_bytes    resident memory of the process at most, imports and loading included
    loss          the mean over the training
    losses        as logged, one every logging_steps
    transformers, trl    their versions
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

KIB = 1024  # bytes; ru_maxrss counts in these on Linux


def main() -> None:
    """Train once, in a child process, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    path = parser.parse_args().config
    logged = train(path)
    summary = next((entry for entry in logged if "train_runtime" in entry), None)
    if summary is None:
        sys.exit(
            f"{path}: EasyDistill's trainer ended without a train_runtime; run its kd/train.py to see why"
        )
    report = {
        "tokens": count_tokens(json.loads(Path(path).read_text(encoding="utf-8"))),
        "seconds": summary["train_runtime"],
        "peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * KIB,
        "loss": summary["train_loss"],
        "losses": [entry["loss"] for entry in logged if "loss" in entry],
        **{name: importlib.metadata.version(name) for name in ("transformers", "trl")},
    }
    print(json.dumps(report))


def train(config_path: str) -> list[dict[str, Any]]:
    """Run kd/train.py; return what it logged, an entry a line of the form {'name': number}."""
    spec = importlib.util.find_spec("easydistill")
    if spec is None or spec.origin is None:
        sys.exit(f"{sys.executable}: no package easydistill; run this with .venv-easydistill/bin/python")
    trainer = Path(spec.origin).with_name("kd") / "train.py"
    with tempfile.TemporaryDirectory() as cache:
        finished = subprocess.run(
            [sys.executable, str(trainer), "--config", config_path],
            env={**os.environ, "HF_DATASETS_CACHE": cache},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    if finished.returncode != 0:
        sys.exit(
            f"{config_path}: exit code {finished.returncode}; {finished.stdout.strip().splitlines()[-1]}"
        )
    return [ast.literal_eval(entry) for entry in re.findall(r"\{'[^{}]*\}", finished.stdout)]


def count_tokens(config: dict[str, Any]) -> int:
    """Return the tokens of all records, rendered as EasyDistill does, times the epochs."""
    from jinja2 import Environment
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config["models"]["student"])
    template = Environment().from_string(Path(config["dataset"]["template"]).read_text(encoding="utf-8"))
    limit = config["training"].get("max_length", 1024)  # TRL's own
    total = 0
    for record in json.loads(Path(config["dataset"]["labeled_path"]).read_text(encoding="utf-8")):
        message = {"content": record["instruction"], "output": record["output"]}
        text = template.render(message=message, add_generation_prompt=False, add_output=True)
        text = text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token
        total += min(len(tokenizer(text)["input_ids"]), limit or sys.maxsize)
    return round(total * config["training"].get("num_train_epochs", 3))


if __name__ == "__main__":
    main()
