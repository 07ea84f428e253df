"""Times the in-process engine beside the naive path, plain `generate`, vLLM and what arithmetic allows.

make bench-label [PROMPTS=FILE], or on a GPU: python benchmarks/label.py --shape qwen2.5-7b

FILE is a JSON list of {instruction, input}; without it, the project's own sample. Greedy, at
most 96 new tokens. Every round runs all paths one after the other; figures are medians of the rounds. The
naive path is slow and even, so it gets the first 32 prompts only. vLLM runs where .venv-vllm exists
(make .venv-vllm/installed), in a process of its own after the first round; its loading is not counted.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from shapes import SHAPES

from distill_app.core.models import load_teacher
from distill_app.core.prompts import teacher_prompt
from distill_app.data.sources import Dataset, load_rows
from distill_app.generation.answers import Sampling
from distill_app.generation.batch import generate
from distill_app.generation.packing import packed_weights
from distill_app.generation.vllm_process import without_spaces

TEACHER = "models/base/teacher"
SAMPLE = "data/sample/DistilQwen_100k"
NAIVE_PROMPTS = 32
ROWS = 128  # of the products by which the machine's speed is measured; the default batch
VLLM = Path(".venv-vllm").absolute()
OURS = "this engine"

Answers = list[tuple[str, int]]  # text and tokens


def main() -> None:
    """Run all paths and print what they did."""
    args = arguments()
    model, tokenizer = load_teacher(args.model, "none")
    if args.shape:
        model = random_model(args.shape)
    prompts = read_prompts(args.prompts, args.count, tokenizer)
    print(f"{len(prompts)} prompts, greedy, at most {args.max_new_tokens} new tokens, {model.dtype}")
    plain = partial(transformers_generate, model, tokenizer, args.max_new_tokens)
    paths: dict[str, Callable[[], Answers]] = {
        f"{OURS}, batch of {size}": partial(ours, model, tokenizer, prompts, args.max_new_tokens, size)
        for size in args.batch_size
    }
    paths["naive: batch of 2, as they come"] = partial(plain, prompts[:NAIVE_PROMPTS], 2)
    by_length = sorted(prompts, key=lambda p: len(tokenizer(p)["input_ids"]))
    paths["plain generate: by length, batch of 64"] = partial(plain, by_length, 64)
    speeds: dict[str, list[float]] = {name: [] for name in paths}
    said: dict[str, Answers] = {}
    for number in range(args.rounds):
        for name, run in paths.items():
            start = time.perf_counter()
            said[name] = run()
            tokens = sum(count for _, count in said[name])
            speeds[name].append(tokens / (time.perf_counter() - start))
            print(f"round {number + 1}, {name}: {tokens} tokens, {speeds[name][-1]:.0f}/s", flush=True)
        if number == 0 and not args.shape and VLLM.exists():
            speeds["vLLM"], said["vLLM"] = vllm(prompts, args, tokenizer)
    show_agreement(said, prompts, by_length)
    show(speeds, arithmetic_limit(model, tokenizer, prompts, said))


def arguments(count: int = 320, max_new_tokens: int = 96) -> argparse.Namespace:
    """Read the command line; the benchmarks beside this one take the same."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", help="JSON list of {instruction, input}")
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    parser.add_argument("--model", default=TEACHER, help="checkpoint folder or Hub id")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of that shape, no vLLM beside them")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128])
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def read_prompts(path: str | None, count: int, tokenizer: Any) -> list[str]:
    """Return the first prompts as the teacher is asked."""
    rows = load_rows(Dataset(path or SAMPLE, f"train[:{count}]"))
    return [teacher_prompt(tokenizer, r["instruction"], r.get("input") or "", "system1") for r in rows]


def random_model(shape: str) -> Any:
    """Return an untrained bfloat16 model, on the GPU if there is one; the prompts keep their tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPES[shape])).eval()
    torch.set_default_dtype(torch.float32)
    return model


def ours(model: Any, tokenizer: Any, prompts: list[str], limit: int, size: int) -> Answers:
    answers = generate(model, tokenizer, prompts, Sampling(limit), size)
    return [(answer.text, answer.tokens) for answer in answers]


def transformers_generate(model: Any, tokenizer: Any, limit: int, prompts: list[str], size: int) -> Answers:
    """Answer with transformers' own `generate`, left padded; tokens count up to each answer's end."""
    import torch

    answers: Answers = []
    for start in range(0, len(prompts), size):
        batch = tokenizer(
            prompts[start : start + size],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(model.device)
        with torch.inference_mode():
            out = model.generate(**batch, max_new_tokens=limit, do_sample=False)
        for row in out[:, batch["input_ids"].shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            answers.append((tokenizer.decode(row[:end], skip_special_tokens=True).strip(), end))
    return answers


def vllm(prompts: list[str], args: argparse.Namespace, tokenizer: Any) -> tuple[list[float], Answers]:
    """Return vLLM's tokens a second, one number a round, and its answers."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "prompts.json"), Path(folder, "answers.json")
        asked.write_text(json.dumps(prompts))
        rest = [asked, args.max_new_tokens, answered, args.rounds]
        with without_spaces(VLLM) as home:
            command = [home / "bin/python", "benchmarks/vllm_peer.py", args.model, *map(str, rest)]
            peer = subprocess.Popen(command, start_new_session=True)
            try:
                if peer.wait():
                    raise RuntimeError(f"vLLM's process ended with {peer.returncode}; see its lines above")
            finally:
                with contextlib.suppress(ProcessLookupError):  # what it has started too
                    os.killpg(peer.pid, signal.SIGKILL)
        report = json.loads(answered.read_text())
    answers = [(tokenizer.decode(a, skip_special_tokens=True).strip(), len(a)) for a in report["answers"]]
    return [report["tokens"] / seconds for seconds in report["generate_sec"]], answers


def arithmetic_limit(model: Any, tokenizer: Any, prompts: list[str], said: dict[str, Answers]) -> float:
    """Return the tokens a second of a machine that does nothing but this engine's matrix products.

    Its speed is measured on products of the model's own shape and dtype. The work is two operations a weight
    and token: the layers for each token that is read or written, a head that all prompts share once, and the
    output layer for each token that is written. Attention is left out: short rows make it small.
    """
    import torch

    answers = next(answers for name, answers in said.items() if name.startswith(OURS))
    written = sum(tokens for _, tokens in answers)
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    shared = len(os.path.commonprefix(ids))
    read = sum(map(len, ids)) - shared * (len(ids) - 1)
    output = model.get_output_embeddings().weight
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    layers = sum(m.weight.numel() for m in linear if m.weight is not output)
    work = 2 * (layers * (read + written - len(ids)) + output.numel() * written)  # the last token is not read
    largest = max(linear, key=lambda layer: layer.weight.numel())
    with packed_weights(model), torch.inference_mode():
        per_sec = products_per_sec(largest, ROWS)
    print(f"\n{work / 1e9:.0f} GFLOP of products in {model.dtype}, measured {per_sec / 1e9:.0f} GFLOP/s")
    return written / (work / per_sec)


def products_per_sec(layer: Any, rows: int) -> float:
    """Return the operations a second of a linear layer's product, of the best of a few rounds."""
    import torch

    weight = layer.weight
    entering = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            out = layer(entering)
        float(out[0, 0])  # waits for a GPU
        best = max(best, 10 * 2 * rows * weight.numel() / (time.perf_counter() - start))
    return best


def show(speeds: dict[str, list[float]], limit: float) -> None:
    """Print the medians of the rounds, and last how this engine stands to vLLM and to the limit."""
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ours = max(value for name, value in medians.items() if name.startswith(OURS))
    print(f"\n{'':<40}tokens/s   of all rounds             this engine is faster by")
    for name, value in medians.items():
        rounds = " ".join(f"{speed:.0f}" for speed in speeds[name])
        print(f"{name:<40}{value:>8.0f}   {rounds:<25} {ours / value:.2f}")
    print(f"{'arithmetic limit':<40}{limit:>8.0f}")
    beside = f"{ours / medians['vLLM']:.2f} times vLLM, " if "vLLM" in medians else ""
    print(f"\nratio: {beside}{ours / limit:.0%} of the arithmetic limit")


def show_agreement(said: dict[str, Answers], prompts: list[str], by_length: list[str]) -> None:
    """Print how many answers are the same as this engine's; bfloat16 rounds near ties either way."""
    name, mine = next((name, answers) for name, answers in said.items() if name.startswith(OURS))
    order = {"plain": by_length}
    texts = {prompt: text for prompt, (text, _) in zip(prompts, mine, strict=True)}
    for other, answers in said.items():
        asked = order.get(other.split()[0], prompts)
        same = sum(texts[prompt] == text for prompt, (text, _) in zip(asked, answers, strict=False))
        if other != name:
            print(f"same answers, {name} and {other}: {same} of {len(answers)}")


if __name__ == "__main__":
    main()
