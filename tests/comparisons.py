"""What the stages before leave, made up but in proportion, and the comparison made of it."""

import copy
import json
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from distill_app.evaluation.compare import compare_models
from distill_app.evaluation.params import CompareParams

ROOT = Path(__file__).parents[1]
MODELS = ("teacher", "system1_before", "system1", "system2_before", "system2")
ASKED = {
    "instructions": ("teacher", "system1_before", "system1", "teacher_again"),
    "reasoning": ("teacher", "system2_before", "system2"),
}
AGREEMENT = {
    "teacher": 1.0,
    "teacher_as_student": 0.8,
    "system1": 0.57,
    "system1_other_prompt": 0.48,
    "system1_before": 0.4,
}
NATS = {"teacher": 0.8, "teacher_again": 1.6, "system1": 1.35, "system1_other_prompt": 2.1}
RIGHT = {"teacher": 0.7, "system2_before": 0.1, "system2": 0.5}
LENGTH = {
    "teacher": 40,
    "system1": 30,
    "system2": 36,
    "teacher_again": 41,
    "system1_before": 44,
    "system2_before": 44,
}
SEED = 3
WORDS = [
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


def figure(value: float | None, spread: float = 0.0) -> dict[str, float | None]:
    if value is None or not spread:
        return {"value": value, "low": None, "high": None}
    return {"value": value, "low": max(0.0, value - spread), "high": value + spread}


def answers(count: int = 60) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of answers.json; the first half of the problems have frames that training knows."""
    rng = random.Random(SEED)
    instructions, reasoning = [], []
    for place in range(count):
        reference = _text(rng, 14)
        row: dict[str, Any] = {"prompt": f"Instruction {place}: {_text(rng, 8)}", "reference": reference}
        for name in ASKED["instructions"]:
            row[name] = _answer(rng, _text(rng, 12), LENGTH[name])
        row["teacher"]["text"] = reference
        row["system1"]["text"] = reference.replace(" the ", " a ").replace("red", "blue")
        row["system1"]["cut"] = place == 1
        tokens = rng.randint(15, 40)
        row["forced"] = {who: _forced(rng, tokens, share) for who, share in AGREEMENT.items()}
        row["forced"]["teacher"] = {"tokens": tokens, "agreed": tokens, "kl": 0.0, "nats": 0.8 * tokens}
        row["free"] = {who: {"tokens": tokens, "nats": tokens * rng.gauss(n, 0.2)} for who, n in NATS.items()}
        instructions.append(row)
        problem: dict[str, Any] = {
            "prompt": f"Problem {place}: {_frame(place, count)}",
            "reference": f"Step 1: {place} + 1 = {place + 1}.\nThe answer is \\boxed{{{place + 1}}}.",
        }
        for name in ASKED["reasoning"]:
            result = place + 1 if rng.random() < RIGHT[name] else place + 500
            steps = f"Step 1: {place} + 1 = {result}.\nStep 2: {result} * 1 = {result}."
            problem[name] = _answer(rng, f"{steps}\nThe answer is \\boxed{{{result}}}.", LENGTH[name])
        reasoning.append(problem)
    return {"instructions": instructions, "reasoning": reasoning}


def _text(rng: random.Random, length: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(length)).capitalize() + "."


def _answer(rng: random.Random, text: str, length: int) -> dict[str, Any]:
    return {"text": text, "tokens": length + rng.randint(-9, 9), "cut": False, "refused": False}


def _forced(rng: random.Random, tokens: int, share: float) -> dict[str, float]:
    agreed = sum(rng.random() < share for _ in range(tokens))
    return {"tokens": tokens, "agreed": agreed, "kl": tokens * (1.1 - share), "nats": tokens * (2 - share)}


def _frame(place: int, count: int) -> str:
    if place < count / 2:
        return f"What is {place} and 1?"
    return f"How many are there if one more than {place} of them come?"


def costs() -> dict[str, dict[str, Any]]:
    """Return costs.json: both students are twice as fast as their teacher, token by token."""
    found: dict[str, dict[str, Any]] = {}
    for name in MODELS:
        small = name.startswith("system1")
        found[name] = {
            "model": f"models/{name}",
            "weights": f"sha256:{name}",
            "quantization": "none",
            "engine": "transformers",
            "parameters": 106194240 if small else 134515008,
            "bytes": 212410880 if small else 269060552,
            "loaded_bytes": 212388736 if small else 269030016,
        }
    for name, pace in (("teacher", 0.04), ("system1", 0.02), ("system2", 0.02)):
        tasks = ["instructions", "reasoning"] if name == "teacher" else [task_of(name)]
        found[name]["timed"] = {task: _timed(pace) for task in tasks}
    return found


def task_of(name: str) -> str:
    return "instructions" if name == "system1" else "reasoning"


def _timed(pace: float) -> dict[str, Any]:
    rounds = [1.0, 1.01, 0.99]
    return {
        "first_sec": [[0.05 * n, 0.06 * n] for n in rounds],
        "alone_sec": [[(0.05 + 7 * pace) * n, (0.06 + 7 * pace) * n] for n in rounds],
        "alone_tokens": [8, 8],
        "load_sec": [8 * pace * n for n in rounds],
        "load_prompts": 8,
        "load_tokens": 64,
        "working_bytes": 30_000_000,
    }


def benchmarks() -> dict[str, Any]:
    rng = random.Random(SEED)
    shares = dict(zip(MODELS, (0.8, 0.5, 0.78, 0.8, 0.6), strict=True))
    scores = {name: [float(rng.random() < share) for _ in range(200)] for name, share in shares.items()}
    return {
        "everyday": {
            "metric": "acc",
            "filter": "none",
            "questions": 200,
            "chance": 0.25,
            "higher_is_better": True,
            "models": {name: figure(sum(found) / 200, 0.06) for name, found in scores.items()},
            "scores": scores,
        }
    }


def write_inputs(
    folder: Path, rows: dict[str, Any] | None = None, cost: dict[str, Any] | None = None
) -> None:
    """Write into a folder all that the stage reads, with no model in it."""
    rows = rows or answers()
    for name in ("models/system1", "models/system2", "data", "metrics", "reports"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _save(folder / "reports/answers.json", rows)
    _save(folder / "reports/costs.json", cost or costs())
    _save(folder / "reports/benchmarks.json", benchmarks())
    for path, task in (("heldout_s1_labeled", "instructions"), ("heldout_s2", "reasoning")):
        records = [{"instruction": r["prompt"], "input": "", "output": "o"} for r in rows[task]]
        _save(folder / f"data/{path}.json", records)
    for path, text in (
        ("train_labeled", "Another one"),
        ("omnithought_cot", "Problem 1000: What is 9 and 1?"),
    ):
        _save(folder / f"data/{path}.json", [{"instruction": text, "input": "", "output": "o"}])
    for name in ("s1", "s2"):
        _save(folder / f"metrics/train_{name}.json", {"validation_loss": 1.25})
        for kind in ("loss", "validation"):
            (folder / f"metrics/train_{name}_{kind}.csv").write_text("step,loss\n5,2.5\n10,1.5\n")


def _save(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))


def params(**changes: Any) -> CompareParams:
    section = yaml.safe_load((ROOT / "params.yaml").read_text())["compare"]
    for key, value in changes.items():
        section[key] = {**section[key], **value} if isinstance(value, dict) else value
    return CompareParams.model_validate(section)


def compared(
    rows: dict[str, Any] | None = None, cost: dict[str, Any] | None = None, **changes: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the comparison and the scored answers of these inputs."""
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), rows, cost)
        places = (str(Path(folder, name)) for name in ("data", "metrics", "reports"))
        return compare_models(params(**changes), *places)


@cache
def _default() -> tuple[dict[str, Any], dict[str, Any]]:
    return compared()


def comparison() -> dict[str, Any]:
    return copy.deepcopy(_default()[0])


def scored(count: int = 6) -> dict[str, list[dict[str, Any]]]:
    """Return scored answers as the page gets them, so many of each task.

    System 1 agrees more with every place; System 2 alone is right, in every other place.
    """
    rows = answers(count)
    for place, row in enumerate(rows["instructions"]):
        row["score"] = place / count
        for name in ASKED["instructions"]:
            row[name] |= {"chrf": 20.0}
    for place, row in enumerate(rows["reasoning"]):
        row["known"] = place % 3 == 0
        for name in ASKED["reasoning"]:
            row[name] |= {"right": name == "system2" and place % 2 == 0, "steps": place % 3}
        row["score"] = float(row["system2"]["right"])
        row["system2"]["text"] = row["reference"].replace("Step 1", "First")
    return rows


def curves() -> dict[str, dict[str, list[dict[str, float]]]]:
    train = [{"step": 5 * n, "loss": 1.5 + 2 / n} for n in range(1, 12)]
    held_out = [{"step": 25 * n, "loss": 1.6 + 1 / n} for n in range(1, 3)]
    return {name: {"train": train, "validation": held_out} for name in ("system1", "system2")}


ORIGIN = {
    "models": {"teacher": {"model": "models/base/teacher", "weights": "sha256:abc"}},
    "params": {"seed": 17},
}
