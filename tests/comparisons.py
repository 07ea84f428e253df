"""A comparison as the stage writes it, made up but in proportion; tests change copies of it."""

import random
from typing import Any

MODELS = ("teacher", "system1_before", "system1", "system2_before", "system2")


def figure(value: float | None, spread: float = 0.0) -> dict[str, float | None]:
    if value is None or not spread:
        return {"value": value, "low": None, "high": None}
    return {"value": value, "low": max(0.0, value - spread), "high": value + spread}


def share(value: float, spread: float) -> dict[str, float | None]:
    return {"value": value, "low": max(0.0, value - spread), "high": min(1.0, value + spread)}


def comparison() -> dict[str, Any]:
    loss = dict(zip(MODELS, (0.78, 2.86, 1.63, 3.10, 2.95), strict=True))
    chrf = dict(zip(MODELS, (100.0, 13.1, 22.1, 12.0, 11.4), strict=True))
    right = dict(zip(MODELS, (0.04, 0.0, 0.02, 0.0, 0.40), strict=True))
    steps = dict(zip(MODELS, (0.98, 0.28, 0.30, 0.28, 1.0), strict=True))
    length = dict(zip(MODELS, (44.0, 71.0, 39.0, 70.0, 52.0), strict=True))
    cut = dict(zip(MODELS, (0.03, 0.44, 0.0, 0.44, 0.02), strict=True))
    speed = dict(zip(MODELS, (24.0, 31.0, 31.5, 24.1, 23.9), strict=True))
    models = {
        name: {
            "name": f"models/{name}",
            "instructions": {
                "loss": figure(loss[name], 0.1),
                "chrf": figure(chrf[name], 0 if name == "teacher" else 1.7),
                "length": figure(length[name], 6),
                "cut": share(cut[name], 0.08),
            },
            "reasoning": {
                "accuracy": share(right[name], 0.12),
                "multi_step": share(steps[name], 0.05),
                "length": figure(1.4 * length[name], 8),
                "cut": share(cut[name], 0.1),
            },
            "cost": {
                "tokens_per_sec": figure(speed[name], 1.2),
                "latency_p50_sec": figure(16 / speed[name]),
                "latency_p95_sec": figure(18 / speed[name]),
                "tokens_per_sec_batch": figure(8 * speed[name]),
                "latency_p50_sec_batch": figure(24 / speed[name]),
                "latency_p95_sec_batch": figure(24 / speed[name]),
                "peak_memory_bytes": figure(1.1e9),
                "parameters": figure(106194240 if name.startswith("system1") else 134515008),
                "bytes": figure(212410880 if name.startswith("system1") else 269060552),
            },
        }
        for name in MODELS
    }
    return {
        "prompts": {"instructions": 34, "reasoning": 50},
        "batch": 20,
        "models": models,
        "verdicts": {
            "system1": {
                "task": "instructions",
                "measure": "chrf",
                "outcome": "missed",
                "retention": figure(0.221, 0.02),
                "speedup": figure(1.3, 0.02),
                "gain": figure(9.0, 2.0),
                "checks": [
                    {"name": "retention", "found": figure(0.221, 0.02), "wanted": 0.9, "outcome": "missed"},
                    {"name": "speedup", "found": figure(1.3, 0.02), "wanted": 3.0, "outcome": "missed"},
                ],
                "sentences": [
                    "System 1 does not replace its teacher.",
                    "It reaches 22% (95% interval 20 to 24) of the teacher's chrF; wanted are 90%: missed.",
                    "Distillation made it better: 22.1 chrF, before it 13.1.",
                    "None of its 34 held-out prompts is in its training data.",
                ],
            },
            "system2": {
                "task": "reasoning",
                "measure": "accuracy",
                "outcome": "unclear",
                "retention": {"value": 10.0, "low": 4.0, "high": None},
                "speedup": figure(1.0, 0.02),
                "gain": figure(0.4, 0.13),
                "checks": [
                    {
                        "name": "retention",
                        "found": {"value": 10.0, "low": 4.0, "high": None},
                        "wanted": 0.9,
                        "outcome": "met",
                    },
                    {"name": "speedup", "found": figure(1.0, 0.2), "wanted": 1.1, "outcome": "unclear"},
                    {"name": "multi_step", "found": share(1.0, 0.07), "wanted": 0.8, "outcome": "met"},
                ],
                "sentences": [
                    "Whether System 2 replaces its teacher cannot be told: 20 timed prompts are too few to weigh its speed.",
                    "100% (95% interval 93 to 100) of its answers take two steps or more; wanted are 80%: met.",
                    "None of its 50 held-out problems is in its training data.",
                ],
            },
        },
        "overlap": {"system1": 0, "system2": 0},
        "benchmarks": {
            "everyday": {
                "metric": "acc",
                "questions": 60,
                "chance": 0.25,
                "models": {name: figure(0.3 + place / 20, 0.11) for place, name in enumerate(MODELS)},
            }
        },
    }


def answers(count: int = 6) -> dict[str, list[dict[str, Any]]]:
    rng = random.Random(0)
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "reads",
        "seven",
        "red",
        "books",
        "and",
        "counts",
        "pens",
        "near",
        "a",
        "lazy",
        "river",
    ]

    def text(length: int) -> str:
        return " ".join(rng.choice(words) for _ in range(length)).capitalize() + "."

    instructions, reasoning = [], []
    for place in range(count):
        row: dict[str, Any] = {"prompt": f"Instruction {place}: {text(8)}", "reference": text(14)}
        problem: dict[str, Any] = {
            "prompt": f"Problem {place}: {text(10)}",
            "reference": f"Step 1: {place} + 1 = {place + 1}.\nThe answer is \\boxed{{{place + 1}}}.",
        }
        for name in MODELS:
            row[name] = {"text": text(12), "tokens": 14, "cut": place == 1, "refused": False, "chrf": 20.0}
            right = name == "system2" and place % 2 == 0
            problem[name] = {"text": text(12), "tokens": 14, "cut": False, "refused": False}
            problem[name] |= {"right": right, "steps": place % 3}
        row["teacher"]["text"] = row["reference"]
        row["system1"]["text"] = row["reference"].replace(" the ", " a ").replace("red", "blue")
        problem["system2"]["text"] = problem["reference"].replace("Step 1", "First")
        instructions.append(row)
        reasoning.append(problem)
    return {"instructions": instructions, "reasoning": reasoning}


def curves() -> dict[str, dict[str, list[dict[str, float]]]]:
    train = [{"step": 5 * n, "loss": 1.5 + 2 / n} for n in range(1, 12)]
    held_out = [{"step": 25 * n, "loss": 1.6 + 1 / n} for n in range(1, 3)]
    return {name: {"train": train, "validation": held_out} for name in ("system1", "system2")}


ORIGIN = {
    "models": {"teacher": {"from": "models/base/teacher", "weights": "sha256:abc"}},
    "params": {"seed": 17},
}
