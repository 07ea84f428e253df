"""Counts the answers that change with the batch: other sizes, another order, other company, other threads.

make bench-invariance [PROMPTS=FILE]

FILE is a JSON list of {instruction, input}; without it, the project's own sample. Every line is compared with
the first, text and token counts.
"""

import random

import torch
from label import arguments, read_prompts

from distill_app.core.models import load_teacher
from distill_app.generation.answers import Sampling
from distill_app.generation.batch import generate


def main() -> None:
    """Ask all prompts again and again, greedily and sampled."""
    args = arguments()
    model, tokenizer = load_teacher(args.model, "none")
    prompts = read_prompts(args.prompts, args.count, tokenizer)
    shuffled = random.Random(1).sample(prompts, len(prompts))
    threads = torch.get_num_threads()
    print(f"{len(prompts)} prompts, at most {args.max_new_tokens} new tokens, bfloat16, {threads} threads")
    for sampling in (Sampling(args.max_new_tokens), Sampling(args.max_new_tokens, 0.8, 0.9, seed=1)):
        first = dict(zip(prompts, generate(model, tokenizer, prompts, sampling, 128), strict=True))
        runs = {
            "batch of 20": (prompts, 20, threads),
            "batch of 64, shuffled": (shuffled, 64, threads),
            "batch of all": (prompts, len(prompts), threads),
            "every fifth prompt, batch of 33": (shuffled[::5], 33, threads),
            "one at a time (20 prompts)": (shuffled[:20], 1, threads),
            "batch of 128, one thread": (shuffled[:100], 128, 1),
        }
        for name, (asked, size, count) in runs.items():
            torch.set_num_threads(count)
            answers = generate(model, tokenizer, asked, sampling, size)
            torch.set_num_threads(threads)
            changed = sum(first[p] != answer for p, answer in zip(asked, answers, strict=True))
            print(
                f"temperature {sampling.temperature}: {name}: {changed} of {len(asked)} changed", flush=True
            )


if __name__ == "__main__":
    main()
