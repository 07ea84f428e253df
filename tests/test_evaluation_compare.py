"""From answers and costs to figures; nothing is asked and the inputs must be of one run."""

import comparisons
import pytest
from comparisons import compared, write_inputs

from distill_app.evaluation.compare import compare_models
from distill_app.evaluation.measures import BY_KEY, MEASURES, show, show_both, show_interval, write


def test_agreement_is_weighted_by_tokens_and_stands_between_floor_and_ceiling():
    comparison = comparisons.comparison()
    rows = comparisons.answers()["instructions"]
    tokens = sum(row["forced"]["system1"]["tokens"] for row in rows)
    agreed = sum(row["forced"]["system1"]["agreed"] for row in rows)
    found = comparison["models"]["system1"]["instructions"]["agreement"]
    assert found["value"] == pytest.approx(agreed / tokens, rel=1e-5)
    floor = comparison["anchors"]["system1_other_prompt"]["instructions"]["agreement"]["value"]
    ceiling = comparison["anchors"]["teacher_as_student"]["instructions"]["agreement"]["value"]
    assert floor < found["low"] < found["high"] < ceiling


def test_problems_of_known_and_of_new_frames_are_scored_apart():
    comparison, rows = compared()
    assert comparison["prompts"] == {"instructions": 60, "reasoning": 60, "known": 30, "new": 30}
    figures = comparison["models"]["system2"]["reasoning"]
    for key, known in (("accuracy_known", True), ("accuracy_new", False)):
        own = [row["system2"]["right"] for row in rows["reasoning"] if row["known"] is known]
        assert figures[key]["value"] == pytest.approx(sum(own) / len(own))


def test_a_students_loss_is_on_what_it_learned_from():
    models = comparisons.comparison()["models"]
    assert models["system2"]["reasoning"]["loss"]["value"] == 1.25
    assert models["system1"]["instructions"]["loss"]["value"] == pytest.approx(1.43, abs=0.01)


def test_memory_is_that_of_the_weights_and_of_the_work():
    size = comparisons.comparison()["models"]["system1"]["size"]
    assert size["memory"]["value"] == pytest.approx(212388736 + 30_000_000, rel=1e-5)


def test_each_model_has_figures_of_its_own_task_alone():
    models = comparisons.comparison()["models"]
    assert "reasoning" not in models["system1"] and "instructions" not in models["system2"]
    assert {"instructions", "reasoning"} <= set(models["teacher"])
    assert "seconds" not in models["system1_before"]["instructions"]


def test_answers_of_another_run_are_refused(tmp_path):
    write_inputs(tmp_path)
    comparisons._save(
        tmp_path / "data/heldout_s1_labeled.json", [{"instruction": "x", "input": "", "output": "y"}]
    )
    with pytest.raises(
        ValueError, match=r"60 of 60 prompts in answers\.json are not in it.*run measure again"
    ):
        compare_models(comparisons.params(), *(str(tmp_path / one) for one in ("data", "metrics", "reports")))


def test_prompts_that_training_has_are_counted(tmp_path):
    write_inputs(tmp_path)
    prompt = comparisons.answers()["instructions"][0]["prompt"]
    record = {"instruction": prompt.upper(), "input": "", "output": "o"}
    comparisons._save(tmp_path / "data/train_labeled.json", [record])
    comparison, _ = compare_models(
        comparisons.params(), *(str(tmp_path / one) for one in ("data", "metrics", "reports"))
    )
    assert comparison["overlap"]["system1"]["exact"] == 1
    told = "1 of its 60 held-out instructions are in its training data too: on those it may only repeat."
    assert told in comparison["students"]["system1"]["notes"]


def test_the_same_inputs_give_the_same_comparison():
    assert compared() == compared()


def test_scores_are_cut_by_length_and_kind_of_prompt():
    slices = comparisons.comparison()["students"]["system2"]["slices"]
    assert {one["by"] for one in slices} >= {"frame", "prompt length"}
    for one in slices:
        assert one["prompts"] >= 5 and set(one["figures"]) == {"teacher", "system2_before", "system2"}


def test_every_measure_is_described_once_and_whole():
    assert len(BY_KEY) == len(MEASURES)
    for measure in MEASURES:
        assert measure.name and measure.short and measure.meaning and measure.groups


@pytest.mark.parametrize(
    ("style", "number", "text"),
    [
        ("percent", 0.567, "57%"),
        ("points", -0.1, "-10"),
        ("points", 0.36, "+36"),
        ("seconds", 1.234, "1.23 s"),
        ("times", 2.114, "2.11×"),
        ("bytes", 291_800_000, "291.8 MB"),
        ("count", 134_515_008, "134.5M"),
        ("tokens", 57.2, "57"),
        ("nats", 1.345, "1.34"),
    ],
)
def test_a_number_is_written_with_its_unit(style, number, text):
    assert write(style, number) == text


@pytest.mark.parametrize(
    ("style", "low", "high", "text"),
    [
        ("percent", 0.01, 0.13, "1–13%"),
        ("percent", 0.09, None, "9% or more"),
        ("points", -0.35, 0.16, "-35 to +16"),
        ("seconds", 1.0, 1.5, "1.00–1.50 s"),
        ("nats", 1.0, 1.84, "1.00–1.84"),
        ("percent", None, None, ""),
        ("percent", float("nan"), 1.0, ""),
    ],
)
def test_an_interval_names_its_unit_once(style, low, high, text):
    assert show_interval(style, {"value": 1.0, "low": low, "high": high}) == text


def test_what_is_not_known_is_a_dash():
    unknown = {"value": None, "low": None, "high": None}
    assert show("percent", unknown) == show_both("percent", unknown) == "–"
