import json
from pathlib import Path

import pytest
import yaml
from commandline import distill, distill_here
from fakes import ROOT, Echo

from distill_app.cli import VERBS
from distill_app.generation.answers import Answer, Sampling
from distill_app.labeling.store import AnswerStore, Recipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "./none", "Hello?"], "error: ./none: no such model folder"),
        (["ask", "./none", "Hello?", "--temperature", "-1"], "error: --temperature: found -1, expected 0"),
        (
            ["ask", "./none", "Hello?", "--max-new-tokens", "0"],
            "error: --max-new-tokens: found 0, expected 1",
        ),
        (["chat"], "error: chat: found no model, expected one or --compare"),
        (["chat", "./none"], "error: ./none: no such model folder"),
        (["chat", "--compare"], "error: params.yaml: no such file"),
        (["export", "./none"], "error: ./none: no such model folder"),
        (["ask", "./none", " "], "error: question: found nothing"),
        (["profile", "llama"], "error: profiles/llama.yaml: no such profile; there are: none"),
        (["labels"], "error: params.yaml: no such file"),
        (["labels", "--store", "s"], "error: s: no such store"),
        (["labels", "--prune"], "error: labels: --prune and a choice go together"),
        (["labels", "--older-than", "3"], "error: labels: --prune and a choice go together"),
        (["labels", "--prune", "--older-than", "0"], "error: --older-than: found 0, expected a number of"),
        (["inspect", "./none"], "error: ./none: no such file or folder; fix the path"),
        (["report"], "error: reports/comparison.json: no such file"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_1(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    run = distill_here(*arguments)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith(message) and run.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_80_columns(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run = distill(*verb.split(), "--help")
    assert run.returncode == 0 and run.stdout.startswith(f"usage: distill {verb}".rstrip())
    assert max(map(len, run.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("row", "params"),
    [
        (
            {"problem": "Why?", "answer": "So.", "n": 1},
            ["prepare_s1", "instruction: problem", "output: answer"],
        ),
        ({"question": "Why?", "reasoning": [{"full_response": "So."}]}, ["prepare_s2", "columns: {}"]),
        ({"messages": [{"role": "user", "content": "Why?"}]}, ["prepare_s1", "prepare_s2", "columns: {}"]),
        ({"text": "Why?"}, ["say in columns which ones are"]),
    ],
)
def test_a_dataset_is_inspected_and_the_params_that_read_it_are_told(tmp_path, monkeypatch, row, params):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    shown = distill_here("inspect", "rows.jsonl", "--slice", "train[:2]").stdout
    assert "2 rows looked at" in shown and "row 1\n" in shown and "row 2\n" not in shown
    assert all(name in shown for name in row) and all(told in shown for told in params)
    if "prepare_s1" in params:
        found = yaml.safe_load(shown[shown.index("prepare_s1:") :])
        assert found["prepare_s1"]["dataset"] == "rows.jsonl" and found["prepare_s1"]["slice"] == "train[:2]"


def test_the_store_is_shown_and_pruned_from_the_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    with AnswerStore(tmp_path / "work" / "s") as store:
        for sampling in (Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=17)):
            recipe = Recipe.of(Echo(), sampling)
            store.put(recipe, recipe.key("x"), 8, Answer("a", 1200, "stop"))
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    shown = distill_here("labels", "--store", "work/s")
    assert shown.returncode == 0, shown.stderr
    assert "echo" in shown.stdout and "fake 1" in shown.stdout and "greedy" in shown.stdout
    assert "temperature 0.8, top_p 0.9, seed 17" in shown.stdout
    assert "2 answers, 2400 tokens, " in shown.stdout
    pruned = distill_here("labels", "--store", "work/s", "--prune", "--recipe", recipe.digest.hex()[:12])
    assert "1 recipes and 1 answers removed" in pruned.stdout
    assert "1 answers, 1200 tokens" in distill_here("labels", "--store", "work/s").stdout
    assert distill_here("labels", "--store", "work/s", "--compact").returncode == 0
    assert len(list(Path("work/s").glob("*.answers"))) == 1
    none = distill_here("labels", "--store", "work/s", "--prune", "--older-than", "1")
    assert none.stdout.startswith("0 recipes and 0 answers removed")
    with AnswerStore(tmp_path / "work" / "s") as store:
        store.put(recipe, recipe.key("long"), 8, Answer("", 0, "refused", 9000))
    refused = distill_here("labels", "--store", "work/s", "--prune", "--refused")
    assert refused.stdout == "1 refusals removed\n"
    assert "1 answers, 1200 tokens" in distill_here("labels", "--store", "work/s").stdout
    assert "work/answers: no such store" in distill_here("labels").stderr
