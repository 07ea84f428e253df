"""Times the built-in trainer beside EasyDistill 1.0's and TRL's own defaults; one command, one table.

make bench-train [PROMPTS=FILE]
python benchmarks/train.py --shape qwen2.5-0.5b    speed and memory of a real model's shape, see shapes.py

FILE is a JSON list of {instruction, input, output}; without it, the project's own sample. The recipe is
EasyDistill's example: one epoch, batches of one, accumulation over eight, at most 512 tokens, learning rate
2e-5. Every trainer runs in a process of its own; its speed is tokens trained on by the time that training
took, without imports and loading, its memory the most that its process had. The loss is the mean a token of
the answers to the records that follow, by one piece of code for all. EasyDistill runs where .venv-easydistill
exists (make easydistill). The last line is the ratio of the medians.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from distill_app import load_student, write_system1_config
from distill_app.core.prompts import format_prompt, format_response
from distill_app.data.sources import Dataset, load_rows
from distill_app.easydistill.run import ALLOCATOR
from distill_app.labeling.likelihood import Reading, answer_nats

STUDENT = "models/base/system2"
SAMPLE = "data/sample/DistilQwen_100k"
EASYDISTILL = ".venv-easydistill/bin/python"
HERE = Path(__file__).parent
KIB = 1024  # bytes; ru_maxrss counts in these on Linux

Figures = dict[str, Any]  # tokens_a_second, peak_bytes


def main() -> None:
    """Train with each and print what it took."""
    args = arguments()
    if args.shape:
        from shapes import run_shape

        print(run_shape(args.shape, args.tokens, args.length, args.steps, args.gradient_checkpointing))
        return
    records = [
        {"instruction": r["instruction"], "input": r.get("input") or "", "output": r["output"]}
        for r in load_rows(Dataset(args.prompts or SAMPLE, f"train[:{args.count + args.heldout}]"))
    ]
    heldout = records[args.count :]
    speeds: dict[str, list[float]] = {name: [] for name in args.trainers}
    peaks: dict[str, list[float]] = {name: [] for name in args.trainers}
    print(
        f"{args.count} records, one epoch, {len(heldout)} held out; untrained: {loss(STUDENT, heldout):.3f}"
    )
    with tempfile.TemporaryDirectory(prefix="bench-train-") as scratch:
        for number in range(args.rounds):
            for name in args.trainers:
                config = write_config(Path(scratch) / f"{name}{number}", records[: args.count])
                found = TRAINERS[name](config)
                speeds[name].append(found["tokens_a_second"])
                peaks[name].append(found["peak_bytes"])
                output = json.loads(config.read_text())["training"]["output_dir"]
                print(
                    f"round {number + 1}, {name}: {found['tokens_a_second']:.0f} tokens/s,"
                    f" {found['peak_bytes'] / 1e9:.2f} GB, held-out loss {loss(output, heldout):.3f}",
                    flush=True,
                )
    print(ratio(speeds, peaks))


def ratio(speeds: dict[str, list[float]], peaks: dict[str, list[float]]) -> str:
    """Return in a line how this trainer compares with EasyDistill's, or else with the last of the others."""
    peer = "easydistill" if "easydistill" in speeds else list(speeds)[-1]
    ours, theirs = (statistics.median(speeds[name]) for name in ("ours", peer))
    memory, their_memory = (statistics.median(peaks[name]) for name in ("ours", peer))
    return (
        f"medians: {ours:.0f} tokens/s and {memory / 1e9:.2f} GB, {peer} {theirs:.0f} and"
        f" {their_memory / 1e9:.2f}; ratio: {ours / theirs:.2f} times the speed,"
        f" {memory / their_memory:.2f} of the memory"
    )


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", help="JSON list of {instruction, input, output}")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--heldout", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=default_trainers())
    parser.add_argument("--shape", help="qwen2.5-0.5b or qwen2.5-1.5b: random weights of that shape")
    parser.add_argument("--tokens", type=int, default=4096, help="a step, with --shape")
    parser.add_argument("--length", type=int, default=512, help="tokens of an example, with --shape")
    parser.add_argument("--steps", type=int, default=3, help="with --shape; the first is not timed")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="with --shape")
    return parser.parse_args()


def write_config(folder: Path, records: list[dict[str, str]]) -> Path:
    """Write data and config, all paths absolute, and no checkpoints on the way."""
    folder.mkdir()
    data = folder / "data.json"
    data.write_text(json.dumps(records))
    config = write_system1_config(
        config_path=str(folder / "config.json"),
        student_model=os.path.abspath(STUDENT),
        instruction_path=str(data),
        labeled_path=str(data),
        out_dir=str(folder / "student"),
        training={"save_strategy": "no"},
    )
    return Path(config)


def ours(config: Path) -> Figures:
    """Run the built-in trainer and read its own lines."""
    command = [sys.executable, "-m", "distill_app.training", "--config", str(config)]
    said, peak = run(command, {**ALLOCATOR, **os.environ})
    return {
        "tokens_a_second": float(re.findall(r"([\d.]+) tokens/s", said)[-1]),
        "peak_bytes": peak,
    }


def peer(python: str, script: str, config: Path) -> Figures:
    """Run a peer's script, whose last line is JSON."""
    said, _ = run([python, str(HERE / script), "--config", str(config)], dict(os.environ))
    found = json.loads(said.strip().splitlines()[-1])
    return {"tokens_a_second": found["tokens"] / found["seconds"], "peak_bytes": found["peak_bytes"]}


def easydistill(config: Path) -> Figures:
    """Run EasyDistill 1.0's kd/train.py."""
    job = json.loads(config.read_text())
    data = json.loads(Path(job["dataset"]["labeled_path"]).read_text())
    folded = [
        {**r, "instruction": f"{r['instruction']}\nInput: {r['input']}"} if r["input"] else r for r in data
    ]
    Path(job["dataset"]["labeled_path"]).write_text(json.dumps(folded))
    return peer(EASYDISTILL, "easydistill_peer.py", config)


def trl(config: Path) -> Figures:
    """Run TRL's SFTTrainer as it comes."""
    return peer(sys.executable, "trl_peer.py", config)


TRAINERS = {"ours": ours, "easydistill": easydistill, "trl": trl}


def default_trainers() -> list[str]:
    """Return the trainers that are installed."""
    return [name for name in TRAINERS if name != "easydistill" or Path(EASYDISTILL).exists()]


def run(command: list[str], environment: dict[str, str]) -> tuple[str, int]:
    """Run a command; return what it printed and the most memory that its own process had, in bytes."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{text[-2000:]}")
    return text, usage.ru_maxrss * KIB


def loss(checkpoint: str, records: list[dict[str, str]]) -> float:
    """Return the mean loss a token of the records' answers."""
    model, tokenizer = load_student(checkpoint)
    prompts = [format_prompt(r["instruction"], r["input"]) for r in records]
    responses = [format_response(r["output"]) for r in records]
    found = [one for one in answer_nats(Reading(model, tokenizer, prompts, responses)) if one]
    return sum(one["nats"] for one in found) / sum(one["tokens"] for one in found)


if __name__ == "__main__":
    main()
