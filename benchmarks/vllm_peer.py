"""Times offline vLLM, the peer of our engine: reads prompts, writes what it answered and how long that took.

Runs in .venv-vllm: python benchmarks/vllm_peer.py MODEL_DIR PROMPTS_JSON MAX_NEW_TOKENS OUTPUT_JSON [ROUNDS]

PROMPTS_JSON is a list of rendered prompts; decoding is greedy, in bfloat16, through vLLM's own `LLM` and its
defaults. On a CPU it gets every core and Intel's OpenMP, as its documentation advises, unless the environment
says otherwise.
OUTPUT_JSON:
    vllm                 its version
    load_sec             until the first prompt can be taken
    generate_sec         one number a round, all prompts each
    prompt_tokens        read a round
    tokens               generated a round, ends of sequence included
    answers              token ids of each prompt's answer, in the order of the prompts (of the first round)
    rounds_agree         whether every round gave these answers
"""

import json
import os
import sys
import time
from pathlib import Path

CPU_CACHE_BYTES = 4 << 30  # its default, 92% of the memory, fails beside any other process


def main() -> None:
    """Load once, then generate `ROUNDS` (3) times."""
    model_dir, prompts_path, max_new_tokens, output_path, *rounds = sys.argv[1:]
    start = time.perf_counter()
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams, TokensPrompt, __version__
    from vllm.platforms import current_platform

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = json.loads(Path(prompts_path).read_text(encoding="utf-8"))
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    llm = LLM(
        model_dir,
        dtype="bfloat16",
        generation_config="vllm",
        kv_cache_memory_bytes=CPU_CACHE_BYTES if current_platform.is_cpu() else None,
    )
    load_sec = time.perf_counter() - start
    prompts = [TokensPrompt(prompt_token_ids=i) for i in ids]
    sampling = SamplingParams(temperature=0.0, max_tokens=int(max_new_tokens), detokenize=False)
    seconds, answers = [], []
    for _ in range(int(rounds[0]) if rounds else 3):
        llm.reset_prefix_cache()  # a round must not find its prompts already read
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
    report = {
        "vllm": __version__,
        "load_sec": load_sec,
        "generate_sec": seconds,
        "prompt_tokens": sum(map(len, ids)),
        "tokens": sum(map(len, answers[0])),
        "answers": answers[0],
        "rounds_agree": all(round_ == answers[0] for round_ in answers),
    }
    Path(output_path).write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(f"vllm {__version__}: loaded in {load_sec:.0f} s, {report['tokens'] / min(seconds):.0f} tokens/s")


def _set_up_cpu() -> None:
    """Start over with the environment that vLLM wants on a CPU; it is read before Python's first line."""
    openmp = Path(sys.prefix, "lib", "libiomp5.so")
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    wanted = {
        "VLLM_CPU_OMP_THREADS_BIND": cores,  # else it keeps one core free
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **({"LD_PRELOAD": str(openmp)} if openmp.exists() else {}),
    }
    if missing := {name: value for name, value in wanted.items() if name not in os.environ}:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **missing})


if __name__ == "__main__":
    _set_up_cpu()
    main()
