import pytest
from commandline import distill
from fakes import ROOT, Echo

from distill_app.cli import VERBS
from distill_app.labeling.answers import Answer, Sampling
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
        (["report"], "error: reports/comparison.json: no such file"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_1(tmp_path, arguments, message):
    run = distill(*arguments, cwd=tmp_path)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith(message) and run.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_80_columns(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run = distill(*verb.split(), "--help")
    assert run.returncode == 0 and run.stdout.startswith(f"usage: distill {verb}".rstrip())
    assert max(map(len, run.stdout.splitlines())) <= 80


def test_the_store_is_shown_and_pruned_from_the_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with AnswerStore(tmp_path / "work" / "s") as store:
        for sampling in (Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=17)):
            recipe = Recipe.of(Echo(), sampling)
            store.put(recipe, recipe.key("x"), 8, Answer("a", 1200, "stop"))
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    shown = distill("labels", "--store", "work/s", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "echo" in shown.stdout and "fake 1" in shown.stdout and "greedy" in shown.stdout
    assert "temperature 0.8, top_p 0.9, seed 17" in shown.stdout
    assert "2 answers, 2400 tokens, " in shown.stdout
    pruned = distill(
        "labels", "--store", "work/s", "--prune", "--recipe", recipe.digest.hex()[:12], cwd=tmp_path
    )
    assert "1 recipes and 1 answers removed" in pruned.stdout
    assert "1 answers, 1200 tokens" in distill("labels", "--store", "work/s", cwd=tmp_path).stdout
    none = distill("labels", "--store", "work/s", "--prune", "--older-than", "1", cwd=tmp_path)
    assert none.stdout.startswith("0 recipes and 0 answers removed")
    with AnswerStore(tmp_path / "work" / "s") as store:
        store.put(recipe, recipe.key("long"), 8, Answer("", 0, "refused", 9000))
    refused = distill("labels", "--store", "work/s", "--prune", "--refused", cwd=tmp_path)
    assert refused.stdout == "1 refusals removed\n"
    assert "1 answers, 1200 tokens" in distill("labels", "--store", "work/s", cwd=tmp_path).stdout
    assert "work/answers.sqlite: no such store" in distill("labels", cwd=tmp_path).stderr
