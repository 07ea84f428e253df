"""Every form of the comparison, written to files."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import comparisons
import pytest

from distill_app.evaluation.compare import compare_models
from distill_app.report.write import key_figures, write_report

PLACES = ("models", "metrics", "reports")


@pytest.fixture(autouse=True)
def measured(tmp_path, monkeypatch) -> None:
    """What the stages before have left; no model is in it."""
    monkeypatch.chdir(tmp_path)
    comparisons.write_inputs(tmp_path)


def write() -> dict:
    comparison, answers = compare_models(comparisons.params(), "data", "metrics", "reports")
    write_report(comparison, answers, {"compare": {}}, *PLACES)
    return comparison


def bars() -> list[dict[str, str]]:
    return list(csv.DictReader(Path("reports/scores.csv").read_text().splitlines()))


def test_every_form_of_the_verdict_is_written_and_says_the_same():
    comparison = write()
    assert json.loads(Path("reports/comparison.json").read_text()) == comparison
    for name in ("comparison.html", "comparison.md", "cards/system1.md"):
        text = Path("reports", name).read_text().replace("&#39;", "'")
        assert "System 1 does not replace its teacher" in text, name
        assert "None of its 60 held-out instructions is in its training data." in text, name
    assert json.loads(Path("reports/scores.json").read_text()) == key_figures(comparison)


def test_the_numbers_for_dvc_are_few_and_named_by_what_decides():
    found = key_figures(comparisons.comparison())
    assert set(found["system1"]) == {"agreement", "free_nats", "benchmark:everyday", "speedup", "gain"}
    assert set(found["system2"]) >= {"accuracy", "accuracy_known", "accuracy_new", "multi_step", "speedup"}


def test_every_bar_of_the_plot_has_a_name_of_its_own_and_is_a_percentage():
    write()
    rows = bars()
    names = [row["score"] for row in rows]
    assert len(set(names)) == len(names) and "Right answers: System 2" in names
    assert all(0 <= float(row["percent"]) <= 100 for row in rows)


@pytest.mark.slow
def test_dvc_draws_each_bar_from_its_own_row(tmp_path):
    """Bars of one name would be added up, to more than 100 percent."""
    write()
    Path("dvc.yaml").write_text(
        "plots:\n- reports/scores.csv: {template: bar_horizontal, x: percent, y: score}\n"
    )
    for command in (["init", "-q", "--no-scm"], ["plots", "show", "--json"]):
        done = subprocess.run([sys.executable, "-m", "dvc", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (plot,) = next(iter(json.loads(done.stdout)["data"].values()))
    drawn = plot["content"]["data"]["values"]
    assert sorted(float(row["percent"]) for row in drawn) == sorted(float(row["percent"]) for row in bars())


def test_the_same_inputs_give_the_same_bytes():
    write()
    first = {path: path.read_bytes() for path in Path("reports").rglob("*") if path.is_file()}
    write()
    assert {path: path.read_bytes() for path in Path("reports").rglob("*") if path.is_file()} == first
