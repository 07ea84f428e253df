import csv
import json
import re
from pathlib import Path
from typing import Any

import comparisons
import pytest

from distill_app.comparison.compare import compare_models, require_thresholds
from distill_app.comparison.params import CompareParams

THRESHOLDS = {"min_retention": 0.9, "min_speedup": 3.0, "min_multi_step": 0.8, "fail_below": False}


def compare(**changes: Any) -> dict[str, Any]:
    params = CompareParams(**{**THRESHOLDS, **changes})
    return compare_models(params, {"compare": params.model_dump()}, "data", "models", "metrics", "reports")


@pytest.fixture(autouse=True)
def measured(tmp_path, monkeypatch) -> None:
    """An empty folder with what the stages before have left; no model is in it."""
    monkeypatch.chdir(tmp_path)
    answers = comparisons.answers(40)
    for place, row in enumerate(answers["instructions"]):
        for name in comparisons.MODELS:
            row[name] |= {"chrf": 100.0 if name == "teacher" else 20.0 + place % 7}
            row[name] |= {"reference_nats": 30.0 + place % 5, "reference_tokens": 20}
    for row in answers["reasoning"]:
        row["teacher"]["right"] = True
    costs = {
        name: {
            "model": f"models/{name}",
            "weights": f"sha256:{name}",
            "quantization": "none",
            "parameters": 1000,
            "bytes": 2000,
            "tokens": 16,
            "alone_sec": [0.5 + place / 100 for place in range(20)],
            "batch_sec": [1.0] * 20,
            "peak_memory_bytes": None,
        }
        for name in comparisons.MODELS
    }
    for name in ("models/system1", "models/system2", "data", "metrics", "reports"):
        Path(name).mkdir(parents=True)
    save("reports/answers.json", answers)
    save("reports/costs.json", costs)
    save("reports/benchmarks.json", comparisons.comparison()["benchmarks"])
    for path, task in (("heldout_s1_labeled", "instructions"), ("heldout_s2", "reasoning")):
        records = [{"instruction": r["prompt"], "input": "", "output": "o"} for r in answers[task]]
        save(f"data/{path}.json", records)
    for path in ("train_labeled", "omnithought_cot"):
        save(f"data/{path}.json", [{"instruction": "Another one", "input": "", "output": "o"}])
    for name in ("s1_loss", "s1_validation", "s2_loss", "s2_validation"):
        Path(f"metrics/train_{name}.csv").write_text("step,loss\n5,2.5\n10,1.5\n")


def save(path: str, data: Any) -> None:
    Path(path).write_text(json.dumps(data))


def test_every_form_of_the_verdict_is_written_and_says_the_same():
    comparison = compare()
    assert json.loads(Path("reports/comparison.json").read_text()) == comparison
    for name in ("comparison.html", "comparison.md", "cards/system1.md", "cards/system2.md"):
        text = Path("reports", name).read_text().replace("&#39;", "'")
        assert "does not replace its teacher" in text, name
        assert re.search(r"None of its 40 held-out \w+ is in its training data\.", text), name
    scores = json.loads(Path("reports/scores.json").read_text())
    assert scores["system1"]["retention"] == pytest.approx(
        comparison["verdicts"]["system1"]["retention"]["value"], abs=1e-4
    )
    assert list(scores["system2"]) == ["accuracy", "multi_step", "accuracy_before", "retention", "speedup"]


def test_the_same_measurements_give_the_same_bytes():
    compare()
    first = {path: path.read_bytes() for path in Path("reports").rglob("*") if path.is_file()}
    compare()
    assert first == {path: path.read_bytes() for path in Path("reports").rglob("*") if path.is_file()}


def test_a_plot_gets_a_row_for_every_score_of_every_model():
    compare()
    with open("reports/scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == set(comparisons.MODELS)
    assert {row["score"] for row in rows} == {
        "instructions chrf",
        "instructions loss",
        "reasoning accuracy",
        "reasoning multi_step",
    }
    assert all(float(row["value"]) >= 0 for row in rows)


def test_held_out_prompts_in_the_training_data_are_found_and_told():
    heldout = json.loads(Path("data/heldout_s2.json").read_text())
    heldout[1]["instruction"] = f"  {heldout[1]['instruction'].upper()}!"  # the text is what counts
    save("data/omnithought_cot.json", heldout[:3])
    comparison = compare()
    assert comparison["overlap"] == {"system1": 0, "system2": 3}
    assert (
        "3 of its 40 held-out problems are also in its training data"
        in Path("reports/comparison.md").read_text()
    )


def test_the_held_out_prompts_that_were_asked_are_found_in_any_order():
    heldout = json.loads(Path("data/heldout_s2.json").read_text())
    never_asked = {"instruction": "Never asked", "input": "", "output": "o"}
    save("data/omnithought_cot.json", [never_asked, heldout[0]])
    save("data/heldout_s2.json", [never_asked, *heldout[::-1]])
    assert compare()["overlap"] == {"system1": 0, "system2": 1}
    save("data/heldout_s2.json", heldout[1:])
    with pytest.raises(ValueError, match=r"heldout_s2\.json: 1 of 40 prompts in answers\.json are not in it"):
        compare()


def test_a_verdict_below_its_thresholds_can_be_an_error_of_one_line():
    require_thresholds(compare(min_retention=0.0, min_speedup=0.0, min_multi_step=0.0))
    with pytest.raises(
        ValueError, match=r"System 1's retention is 0\.\d+, compare\.min_retention is 0\.9; .*fail_below"
    ):
        require_thresholds(compare())


def test_a_missing_measurement_is_named_with_what_to_do():
    Path("reports/costs.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"costs\.json: no such file; run the stage that writes it"):
        compare()
