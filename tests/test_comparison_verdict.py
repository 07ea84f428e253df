import pytest

from distill_app.comparison.figures import model_figures
from distill_app.comparison.names import MODELS
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
            row[name] = {"text": "", "tokens": 5, "cut": False, "refused": False, "right": is_right}
            row[name]["steps"] = 2
        rows.append(row)
    return rows


def instructions(chrf: dict[str, float], count: int = 40) -> list[dict]:
    rows = []
    for place in range(count):
        row: dict = {"prompt": f"p{place}", "reference": "1"}
        for name in MODELS:
            found = {"text": "", "tokens": 5, "cut": False, "refused": False}
            found |= {"chrf": chrf.get(name, 50.0) + place % 3}
            row[name] = {**found, "reference_nats": 10.0 + place % 2, "reference_tokens": 10}
        rows.append(row)
    return rows


def costs_of(timed: int = 20, **seconds: float) -> dict[str, dict]:
    return {
        name: {
            "model": name,
            "tokens": 16,
            "alone_sec": [
                seconds.get(name, 1.0) * (1 + (place + spot) % timed / 50) for place in range(timed)
            ],
            "batch_sec": [seconds.get(name, 1.0) * 2] * timed,
            "peak_memory_bytes": None,
            "parameters": 100,
            "bytes": 200,
        }
        for spot, name in enumerate(MODELS)
    }


def verdict(
    name: str,
    reasoning: list[dict],
    chrf: dict[str, float],
    overlap: int = 0,
    timed: int = 20,
    **seconds: float,
) -> dict:
    answers = {"instructions": instructions(chrf), "reasoning": reasoning}
    costs = costs_of(timed, **seconds)
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
        "1.00 times (95% interval 0.95 to 1.07) the teacher's speed; wanted are 3 times: missed"
        in found["sentences"][2]
    )


def test_few_prompts_are_said_to_be_too_few():
    found = verdict("system2", answers_of(12, system2=0.42, teacher=0.5), {}, system2=0.1)
    assert outcomes(found)["retention"] == "unclear" and found["outcome"] == "unclear"
    assert found["sentences"][0] == (
        "Whether System 2 replaces its teacher cannot be told: 12 problems are too few to weigh what it keeps;"
        " 12 problems are too few to weigh its steps."
    )
    assert "too few prompts to tell" in found["sentences"][1]


@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("count", [2, 5, 10, 19])
def test_few_prompts_decide_nothing_however_they_agree(count, right):
    found = verdict("system2", answers_of(count, teacher=1, system2=right), {}, system2=0.1)
    assert outcomes(found)["retention"] == outcomes(found)["multi_step"] == "unclear"
    assert found["retention"]["low"] < 0.9
    gain = verdict("system2", answers_of(count, system2_before=1 - right, system2=right), {})
    assert any(said.startswith("That distillation changed it cannot be told") for said in gain["sentences"])


def test_many_prompts_that_agree_decide():
    assert outcomes(verdict("system2", answers_of(60, teacher=1, system2=1), {}))["retention"] == "met"
    assert outcomes(verdict("system2", answers_of(60, teacher=1, system2=0), {}))["retention"] == "missed"


def test_the_headline_blames_the_check_that_is_unclear():
    found = verdict("system1", answers_of(), {"teacher": 50, "system1": 48}, timed=2, system1=0.2)
    assert outcomes(found) == {"retention": "met", "speedup": "unclear"}
    assert found["sentences"][0] == (
        "Whether System 1 replaces its teacher cannot be told: 2 timed prompts are too few to weigh its speed."
    )


def test_a_teacher_without_a_right_answer_leaves_nothing_to_keep():
    found = verdict("system2", answers_of(teacher=0, system2=0.4), {}, system2=0.1)
    assert found["retention"]["value"] is None and outcomes(found)["retention"] == "unclear"
    assert "The teacher has no right answers" in found["sentences"][1]
    assert found["sentences"][0] == (
        "Whether System 2 replaces its teacher cannot be told: the teacher has no right answers."
    )


def test_problems_whose_reference_cannot_be_read_are_left_out_and_told():
    rows = answers_of(60, teacher=0.5, system2=0.5)
    for row in rows[::3]:
        for name in MODELS:
            row[name]["right"] = None
    found = verdict("system2", rows, {}, system2=0.1)
    checks = {check["name"]: check["prompts"] for check in found["checks"]}
    assert checks == {"retention": 40, "speedup": 20, "multi_step": 60}
    assert found["sentences"][-1] == (
        "Not scored, since no answer can be read in the reference: 20 of 60 problems."
    )
    figures = model_figures(
        "system2", {"instructions": instructions({}), "reasoning": rows}, costs_of()["system2"]
    )
    assert figures["reasoning"]["accuracy"]["value"] == 0.5


def test_without_any_reference_to_read_nothing_is_made_up():
    rows = answers_of(30)
    for row in rows:
        for name in MODELS:
            row[name]["right"] = None
    found = verdict("system2", rows, {}, system2=0.1)
    assert found["outcome"] == "unclear" and "0 problems are too few" in found["sentences"][0]
    assert found["retention"]["value"] is None and found["gain"]["value"] is None


def test_answers_that_a_model_could_not_give_are_told_and_shown():
    answers = {"instructions": instructions({}), "reasoning": answers_of()}
    for row in answers["instructions"][:4]:
        row["system1"] |= {"refused": True, "chrf": 0.0, "tokens": 0}
        del row["system1"]["reference_nats"], row["system1"]["reference_tokens"]
    costs = costs_of()
    models = {who: model_figures(who, answers, costs[who]) for who in MODELS}
    assert models["system1"]["instructions"]["refused"]["value"] == 0.1
    assert models["teacher"]["instructions"]["refused"]["value"] == 0
    assert "refused" not in models["system1"]["reasoning"]
    found = judge_student("system1", models, answers["instructions"], costs, 0, THRESHOLDS)
    assert found["sentences"][-1] == "Too long for System 1, and counted as failed: 4 of 40 prompts."


def test_pairs_that_the_judge_left_unread_win_and_lose_nothing():
    rows = instructions({})
    for place, row in enumerate(rows):
        for name in list(MODELS)[1:]:
            row[name]["against_teacher"] = ["won", "unread"] if place % 2 else ["won", "tied"]
    answers, costs = {"instructions": rows, "reasoning": answers_of()}, costs_of()
    models = {who: model_figures(who, answers, costs[who]) for who in MODELS}
    figures = models["system1"]["instructions"]
    assert figures["win_rate"]["value"] == 0.75 and figures["unread"]["value"] == 0.5
    found = judge_student("system1", models, rows, costs, 0, THRESHOLDS)
    assert found["sentences"][-1] == "Not in its wins, since the judge could not be read: 20 of 40 pairs."
    for row in rows:
        row["system1"]["against_teacher"] = ["unread", "unread"]
    figures = model_figures("system1", answers, costs["system1"])["instructions"]
    assert figures["win_rate"]["value"] is None and figures["unread"]["value"] == 1


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
            "That distillation changed it cannot be told: 50% right answers, before it 50%; by 0 points (95% interval -5 to 5).",
        ),
    ],
)
def test_the_gain_is_distillations_own(now, before, words):
    found = verdict("system2", answers_of(system2=now, system2_before=before), {})
    assert found["sentences"][-2].startswith(words)
    assert found["gain"]["value"] == pytest.approx(now - before)


def test_held_out_prompts_that_training_saw_are_told():
    found = verdict("system1", answers_of(), {}, overlap=3)
    assert "3 of its 40 held-out prompts are also in its training data" in found["sentences"][-1]
    found = verdict("system1", answers_of(), {}, overlap=1)
    assert "1 of its 40 held-out prompts is also in its training data" in found["sentences"][-1]


def test_that_training_saw_none_is_told_too():
    found = verdict("system2", answers_of(), {})
    assert found["sentences"][-1] == "None of its 60 held-out problems is in its training data."


def test_what_is_below_is_named_with_its_threshold_and_what_is_not_is_not():
    good = verdict("system1", answers_of(), {"teacher": 50, "system1": 48}, system1=0.2)
    poor = verdict("system2", answers_of(teacher=0), {})
    assert below({"system1": good}) == []
    assert below({"system1": good, "system2": poor}) == [
        "System 2's retention is unknown, compare.min_retention is 0.9",
        "System 2's speedup is 1, compare.min_speedup is 3",
    ]
