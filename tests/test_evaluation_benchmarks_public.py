"""The tasks of public tables, on a few questions of our own in folders as the Hub has them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, make_tiny_model

from distill_app.evaluation.benchmarks.params import BenchmarkParams
from distill_app.evaluation.benchmarks.run import run_benchmarks
from distill_app.evaluation.candidates import TeacherParams
from distill_app.labeling.params import LabelParams

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
SUMS = [
    {"question": f"Tom has {n} pens and buys 2. How many?", "answer": f"{n} + 2\n#### {n + 2}"}
    for n in range(9)
]
CHOICES = {"text": ["a dog", "a cup", "the sky", "a tree"], "label": ["A", "B", "C", "D"]}
SCIENCE = [
    {"id": str(n), "question": f"What barks {n}?", "choices": CHOICES, "answerKey": "A"} for n in range(3)
]
ENDINGS = [
    {
        "ind": n,
        "activity_label": "Walking",
        "ctx_a": "A man walks.",
        "ctx_b": "he",
        "ctx": "A man walks. he",
        "endings": ["sits.", "flies.", "melts.", "rains."],
        "source_id": "x",
        "split": "val",
        "split_type": "indomain",
        "label": "0",
    }
    for n in range(3)
]
FOLLOWED = [
    {
        "key": n,
        "prompt": "Write without commas.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{"num_words": None}],
    }
    for n in range(2)
]
LANGUAGE = [
    {
        "key": 9,
        "prompt": "Answer in English.",
        "instruction_id_list": ["language:response_language"],
        "kwargs": [{"language": "en"}],
    }
]
PROBLEMS = [{"problem": f"What is {n} + 1?", "solution": "s", "answer": f"{n + 1}"} for n in range(2)]
SUBJECT = [
    {"question": "What barks?", "subject": "x", "choices": CHOICES["text"], "answer": 0} for _ in range(5)
]
SETS: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {
    "openai/gsm8k": {"main": {"train": SUMS, "test": SUMS[:2]}},
    "allenai/ai2_arc": {
        name: dict.fromkeys(("train", "validation", "test"), SCIENCE)
        for name in ("ARC-Easy", "ARC-Challenge")
    },
    "Rowan/hellaswag": {"default": {"train": ENDINGS, "validation": ENDINGS}},
    "google/IFEval": {"default": {"train": FOLLOWED + LANGUAGE}},
    "HuggingFaceH4/MATH-500": {"default": {"test": PROBLEMS}},
}


def write_set(folder: Path, configs: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Write a dataset's folder with a card that names its configs, as the Hub has them."""
    named = []
    for config, splits in configs.items():
        for split, rows in splits.items():
            path = folder / config / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = [{"split": split, "path": f"{config}/{split}.jsonl"} for split in splits]
        named.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': named})}---\n")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A teacher and a student; what was before is the teacher, so that two models are asked."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "teacher").symlink_to(tiny_model_dir)
    make_tiny_model(folder / "system1", seed=3)
    (folder / "system2").symlink_to(folder / "system1")
    return folder


def run(models: Path, tasks: list[Any]) -> dict[str, Any]:
    params = {**PARAMS["benchmark"], "tasks": tasks, "task_dir": str(ROOT / "data/tasks")}
    return run_benchmarks(
        BenchmarkParams.model_validate(params),
        label=LabelParams.model_validate({**PARAMS["label"], "teacher": str(models / "teacher")}),
        teacher=TeacherParams(teacher=None, teacher_revision=None, teacher_quantization="none"),
        system1_before=str(models / "teacher"),
        system2_before=str(models / "teacher"),
        models_dir=str(models),
        log_path="benchmark.log",
    )


@pytest.mark.slow
def test_the_tasks_of_public_tables_run_with_all_their_metrics(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where `datasets` finds a folder before it asks the Hub
    for name, configs in SETS.items():
        write_set(tmp_path / name, configs)
    short = {"max_gen_toks": 8}
    found = run(
        models,
        [
            {"task": "ifeval", **short},
            {"task": "gsm8k", **short},
            {"task": "math500", **short},
            "arc_easy",
            "arc_challenge",
            "hellaswag",
        ],
    )
    metrics = {name: (one["metric"], one["questions"]) for name, one in found.items()}
    assert metrics == {
        "ifeval": ("prompt_level_strict_acc", 3),
        "gsm8k": ("exact_match,flexible-extract", 2),
        "math500": ("right", 2),
        "arc_easy": ("acc_norm", 3),
        "arc_challenge": ("acc_norm", 3),
        "hellaswag": ("acc_norm", 3),
    }
    for one in found.values():  # so that a student is held against its teacher question by question
        assert all(len(scores) == one["questions"] for scores in one["scores"].values())
        assert one["settings"].get("max_gen_toks") in (None, 8)
    assert {"exact_match,strict-match", "exact_match,flexible-extract"} <= set(
        found["gsm8k"]["all_metrics"]["system1"]
    )
    assert "inst_level_loose_acc,none" in found["ifeval"]["all_metrics"]["teacher"]


@pytest.mark.slow
def test_mmlu_is_one_score_over_its_subjects(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subjects = ROOT.glob(".venv/lib/python3*/site-packages/lm_eval/tasks/mmlu/default/mmlu_*.yaml")
    configs = [yaml.safe_load(path.read_text().replace('"tag"', "tag"))["dataset_name"] for path in subjects]
    assert len(configs) == 57
    write_set(tmp_path / "cais/mmlu", {name: {"dev": SUBJECT, "test": SUBJECT[:1]} for name in configs})
    found = run(models, ["mmlu"])["mmlu"]
    assert (found["metric"], found["questions"]) == ("acc", 57)
    assert len(found["scores"]["teacher"]) == len(found["scores"]["system1"]) == 57


@pytest.mark.slow
def test_a_task_that_lacks_a_package_names_it_and_does_not_blame_the_network(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ImportError, match=r"minerva_math500: (?!.*network).*install what it needs; math500 is the same"
    ):
        run(models, ["minerva_math500"])
