import pytest

from distill_app.comparison.figures import MODELS, model_figures
from distill_app.comparison.params import CompareParams
from distill_app.comparison.verdict import below, judge_student

THRESHOLDS = CompareParams(min_retention=0.9, min_speedup=3.0, min_multi_step=0.8, fail_below=False)


def answers_of(count: int = 60, **right: float) -> list[dict]:
    """Reasoning answers of which each model has the given share right, spread evenly; 0.5 if not given."""
    rows = []
    for place in range(count):
        row: dict = {"prompt": f"p{place}", "reference": "1"}
        for name in MODELS:
            share = right.get(name, 0.5)
            is_right = int((place + 1) * share + 1e-9) > int(place * share + 1e-9)
            row[name] = {"text": "", "tokens": 5, "cut": False, "right": is_right, "steps": 2}
        rows.append(row)
    return rows


def instructions(chrf: dict[str, float], count: int = 40) -> list[dict]:
    rows = []
    for place in range(count):
        row: dict = {"prompt": f"p{place}", "reference": "1"}
        for name in MODELS:
            found = {"text": "", "tokens": 5, "cut": False, "chrf": chrf.get(name, 50.0) + place % 3}
            row[name] = {**found, "reference_nats": 10.0 + place % 2, "reference_tokens": 10}
        rows.append(row)
    return rows


def costs_of(**seconds: float) -> dict[str, dict]:
    return {
        name: {
            "model": name,
            "tokens": 16,
            "alone_sec": [seconds.get(name, 1.0) * (1 + place / 50) for place in range(8)],
            "batch_sec": [seconds.get(name, 1.0) * 2] * 8,
            "peak_memory_bytes": None,
            "parameters": 100,
            "bytes": 200,
        }
        for name in MODELS
    }


def verdict(
    name: str, reasoning: list[dict], chrf: dict[str, float], overlap: int = 0, **seconds: float
) -> dict:
    answers = {"instructions": instructions(chrf), "reasoning": reasoning}
    costs = costs_of(**seconds)
    models = {who: model_figures(who, answers, costs[who]) for who in MODELS}
    task = {"system1": "instructions", "system2": "reasoning"}[name]
    return judge_student(name, models, answers[task], costs, overlap, THRESHOLDS)


def outcomes(found: dict) -> dict[str, str]:
    return {check["name"]: check["outcome"] for check in found["checks"]}


def test_a_student_that_keeps_the_skill_at_a_fraction_of_the_time_can_replace_its_teacher():
    found = verdict("system1", answers_of(), {"teacher": 50, "system1": 48}, system1=0.2)
    assert outcomes(found) == {"retention": "met", "speedup": "met"} and found["outcome"] == "met"
    assert found["speedup"]["value"] == pytest.approx(5)
    assert found["sentences"][0] == "System 1 can replace its teacher."
    assert (
        "It reaches 96% (95% interval 96 to 96) of the teacher's chrF; wanted are 90%: met."
        in found["sentences"]
    )


def test_a_slow_student_does_not_however_good_it_is():
    found = verdict("system2", answers_of(system2=0.9, teacher=0.5), {})
    assert outcomes(found) == {"retention": "met", "speedup": "missed", "multi_step": "met"}
    assert found["sentences"][0] == "System 2 does not replace its teacher."
    assert (
        "1.00 times (95% interval 1.00 to 1.00) the teacher's speed; wanted are 3 times: missed"
        in found["sentences"][2]
    )


def test_few_prompts_are_said_to_be_too_few():
    found = verdict("system2", answers_of(12, system2=0.42, teacher=0.5), {}, system2=0.1)
    assert outcomes(found)["retention"] == "unclear" and found["outcome"] == "unclear"
    assert found["sentences"][0] == (
        "Whether System 2 replaces its teacher cannot be told: 12 problems are too few."
    )
    assert "too few prompts to tell" in found["sentences"][1]


def test_a_teacher_without_a_right_answer_leaves_nothing_to_keep():
    found = verdict("system2", answers_of(teacher=0, system2=0.4), {}, system2=0.1)
    assert found["retention"]["value"] is None and outcomes(found)["retention"] == "unclear"
    assert "The teacher has no right answers" in found["sentences"][1]


@pytest.mark.parametrize(
    ("now", "before", "words"),
    [
        (
            0.6,
            0.1,
            "Distillation made it better: 60% right answers, before it 10%; by 50 points (95% interval 3",
        ),
        (
            0.1,
            0.6,
            "Distillation made it worse: 10% right answers, before it 60%; by -50 points (95% interval -6",
        ),
        (
            0.5,
            0.5,
            "That distillation changed it cannot be told: 50% right answers, before it 50%; by 0 points (95% interval 0 to 0).",
        ),
    ],
)
def test_the_gain_is_distillations_own(now, before, words):
    found = verdict("system2", answers_of(system2=now, system2_before=before), {})
    assert found["sentences"][-1].startswith(words)
    assert found["gain"]["value"] == pytest.approx(now - before)


def test_held_out_prompts_that_training_saw_are_told():
    found = verdict("system1", answers_of(), {}, overlap=3)
    assert "3 of its 40 held-out prompts are also in its training data" in found["sentences"][-1]


def test_what_is_below_is_named_with_its_threshold_and_what_is_not_is_not():
    good = verdict("system1", answers_of(), {"teacher": 50, "system1": 48}, system1=0.2)
    poor = verdict("system2", answers_of(teacher=0), {})
    assert below({"system1": good}) == []
    assert below({"system1": good, "system2": poor}) == [
        "System 2's retention is unknown, compare.min_retention is 0.9",
        "System 2's speedup is 1, compare.min_speedup is 3",
    ]
