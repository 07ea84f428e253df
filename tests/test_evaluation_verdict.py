"""The verdict decides as it should: on made-up evidence whose truth is known."""

import copy
import random
from typing import Any

import comparisons
import pytest
from comparisons import compared

from distill_app.evaluation.verdict import below, require_targets


def check(comparison: dict[str, Any], student: str, key: str) -> dict[str, Any]:
    (found,) = [one for one in comparison["students"][student]["checks"] if one["key"] == key]
    return found


def outcomes(comparison: dict[str, Any], student: str) -> dict[str, str]:
    return {one["key"]: one["outcome"] for one in comparison["students"][student]["checks"]}


def as_teacher(rows: dict[str, Any]) -> dict[str, Any]:
    """Put the teacher in both students' places: its texts, and its readings asked as a student is."""
    for row in rows["instructions"]:
        row["system1"] = copy.deepcopy(row["teacher"])
        row["forced"]["system1"] = copy.deepcopy(row["forced"]["teacher_as_student"])
        row["free"]["system1"] = copy.deepcopy(row["free"]["teacher"])
    for row in rows["reasoning"]:
        row["system2"] = copy.deepcopy(row["teacher"])
    return rows


def test_the_teacher_in_a_students_place_is_met_on_quality():
    comparison, _ = compared(as_teacher(comparisons.answers(200)))
    assert {key: outcomes(comparison, "system1")[key] for key in ("agreement", "free_nats")} == {
        "agreement": "met",
        "free_nats": "met",
    }
    found = outcomes(comparison, "system2")
    assert (found["accuracy_known"], found["accuracy_new"], found["multi_step"]) == ("met", "met", "met")


def test_the_student_before_distillation_shows_no_gain():
    rows = comparisons.answers(200)
    for row in rows["instructions"]:
        row["system1"] = copy.deepcopy(row["system1_before"])
        row["forced"]["system1"] = copy.deepcopy(row["forced"]["system1_before"])
    for row in rows["reasoning"]:
        row["system2"] = copy.deepcopy(row["system2_before"])
    comparison, _ = compared(rows)
    for verdict in comparison["students"].values():
        assert verdict["gain"]["outcome"] == "same" and verdict["gain"]["change"]["value"] == 0
        assert verdict["gain"]["sentence"].startswith("Distillation made no significant change:")
        assert verdict["outcome"] == "missed"


def test_a_student_whose_answers_are_shuffled_among_the_prompts_is_missed():
    """Its texts are its own, under other prompts: so are the likelihoods that the teacher gives them."""
    rows = as_teacher(comparisons.answers(200))
    for row in rows["instructions"]:
        row["free"]["system1"] = copy.deepcopy(row["free"]["system1_other_prompt"])
        row["forced"]["system1"] = copy.deepcopy(row["forced"]["system1_other_prompt"])
    texts = [row["system2"] for row in rows["reasoning"]]
    random.Random(0).shuffle(texts)
    for row, text in zip(rows["reasoning"], texts, strict=True):
        row["system2"] = text
    comparison, _ = compared(rows)
    for student, keys in (
        ("system1", ("agreement", "free_nats")),
        ("system2", ("accuracy_known", "accuracy_new")),
    ):
        assert {outcomes(comparison, student)[key] for key in keys} == {"missed"}
        assert comparison["students"][student]["outcome"] == "missed"


def test_a_copyist_that_knows_only_its_frames_is_told_apart():
    rows = comparisons.answers(200)
    for place, row in enumerate(rows["reasoning"]):
        right = place + 1 if place < 100 else -1
        row["system2"]["text"] = f"1 + 1 = 2. 2 + 2 = 4. The answer is \\boxed{{{right}}}."
    comparison, _ = compared(rows)
    assert outcomes(comparison, "system2")["accuracy_known"] == "met"
    assert outcomes(comparison, "system2")["accuracy_new"] == "missed"
    notes = " ".join(comparison["students"]["system2"]["notes"])
    assert "On frames that training never saw it is right less often, by -100 (-100 to -95) points" in notes


def weak_teacher(rows: dict[str, Any], student_right: bool) -> dict[str, Any]:
    for place, row in enumerate(rows["reasoning"]):
        row["teacher"]["text"] = f"The answer is \\boxed{{{place + 1 if place % 25 == 0 else -1}}}."
        row["system2"]["text"] = f"The answer is \\boxed{{{place + 1 if student_right else -1}}}."
    return rows


def test_being_no_worse_than_a_teacher_that_is_nearly_always_wrong_proves_nothing():
    comparison, _ = compared(weak_teacher(comparisons.answers(), student_right=False))
    found = check(comparison, "system2", "accuracy_new")
    assert found["outcome"] == "unclear"
    assert found["sentence"].endswith("cannot tell, since its teacher is too weak here to be a yardstick.")


def test_being_clearly_better_than_a_weak_teacher_does():
    comparison, _ = compared(weak_teacher(comparisons.answers(), student_right=True))
    assert check(comparison, "system2", "accuracy_new")["outcome"] == "met"


def test_a_slow_student_is_missed_however_good_it_is():
    cost = comparisons.costs()
    for rounds in (cost["system2"]["timed"]["reasoning"][key] for key in ("first_sec", "alone_sec")):
        rounds[:] = [[10 * second for second in row] for row in rounds]
    comparison, _ = compared(as_teacher(comparisons.answers(200)), cost)
    assert outcomes(comparison, "system2")["speedup"] == "missed"
    assert comparison["students"]["system2"]["headline"] == "System 2 does not replace its teacher."


def test_an_answers_time_is_that_of_its_own_length():
    """A student that writes as fast as its teacher and half as much is twice as fast, but for the reading."""
    rows, cost = comparisons.answers(), comparisons.costs()
    cost["system2"]["timed"]["reasoning"] = copy.deepcopy(cost["teacher"]["timed"]["reasoning"])
    for row in rows["reasoning"]:
        row["system2"]["tokens"], row["teacher"]["tokens"] = 51, 101
    found = check(compared(rows, cost)[0], "system2", "speedup")["found"]["value"]
    assert found == pytest.approx((0.055 + 100 * 0.04) / (0.055 + 50 * 0.04), rel=1e-3)


@pytest.mark.parametrize("count", [6, 12])
def test_few_prompts_decide_nothing_and_it_is_said_how_many_would(count):
    comparison, _ = compared(comparisons.answers(count))
    found = check(comparison, "system2", "accuracy")
    assert found["outcome"] == "unclear"
    assert f"{count} prompts are too few to judge, {found['needed']} may do" in found["sentence"]
    assert found["needed"] >= 20


def test_what_cannot_be_told_says_how_many_prompts_would_do():
    comparison, _ = compared(as_teacher(comparisons.answers(60)), system2={"max_points_lost": 1.0})
    found = check(comparison, "system2", "accuracy_new")
    assert found["outcome"] == "unclear" and found["needed"] > 60
    assert f"cannot tell from 30 prompts, about {found['needed']} would do" in found["sentence"]


def test_without_fidelity_judge_benchmarks_and_times_the_verdict_says_that_nothing_was_measured():
    rows, cost = comparisons.answers(), comparisons.costs()
    for row in rows["instructions"]:
        del row["forced"], row["free"]
    for one in cost.values():
        one.pop("timed", None)
    comparison, _ = compared(rows, cost)
    verdict = comparison["students"]["system1"]
    assert [one["key"] for one in verdict["checks"]] == ["benchmark:everyday"]
    assert verdict["gain"] is None and verdict["closed"] is None


def judged(rows: dict[str, Any], ways: list[str]) -> dict[str, Any]:
    for row in rows["instructions"]:
        row["system1"]["judged"] = {"teacher": list(ways), "before": ["won", "won"]}
    return rows


@pytest.mark.parametrize(("ways", "outcome"), [(["won", "won"], "met"), (["lost", "lost"], "missed")])
def test_the_judge_decides_where_one_is_set(ways, outcome):
    comparison, _ = compared(judged(comparisons.answers(), ways), system1={"min_win_rate": 0.45})
    assert check(comparison, "system1", "win_rate")["outcome"] == outcome


def test_a_judge_that_is_torn_decides_nothing():
    rows = judged(comparisons.answers(), ["won", "won"])
    for row in rows["instructions"][::2]:
        row["system1"]["judged"]["teacher"] = ["lost", "lost"]
    assert check(compared(rows)[0], "system1", "win_rate")["outcome"] == "unclear"


def test_pairs_that_the_judge_left_unread_win_and_lose_nothing():
    rows = judged(comparisons.answers(), ["won", "won"])
    for row in rows["instructions"][:10]:
        row["system1"]["judged"]["teacher"] = ["won", "unread"]
    comparison, _ = compared(rows)
    told = "Left out of its wins, since the judge could not be read: 10 of 60 pairs."
    assert told in comparison["students"]["system1"]["notes"]
    assert check(comparison, "system1", "win_rate")["outcome"] == "met"


def test_references_without_an_answer_to_read_are_left_out_and_told():
    rows = comparisons.answers()
    for row in rows["reasoning"][:5]:
        row["reference"] = "It depends."
    comparison, scored = compared(rows)
    assert [row["system2"]["right"] for row in scored["reasoning"][:5]] == [None] * 5
    told = "Not scored, since no final answer can be read in the reference: 5 of 60."
    assert told in comparison["students"]["system2"]["notes"]


def test_answers_that_were_cut_or_refused_are_told():
    rows = comparisons.answers()
    for row in rows["reasoning"][:28]:
        row["teacher"]["cut"] = True
    rows["reasoning"][0]["system2"] |= {"text": "", "refused": True, "tokens": 0}
    notes = compared(rows)[0]["students"]["system2"]["notes"]
    assert "Cut at the token limit, of 60 answers each: Teacher 28." in notes
    assert any(note.startswith("Not answered, since the prompt was too long") for note in notes)


def test_a_benchmark_without_scores_question_by_question_decides_nothing(monkeypatch):
    found = comparisons.benchmarks()
    found["everyday"]["scores"] = dict.fromkeys(comparisons.MODELS)
    monkeypatch.setattr(comparisons, "benchmarks", lambda: found)
    assert "benchmark:everyday" not in outcomes(compared()[0], "system1")


def test_on_a_benchmark_where_less_is_better_less_is_better(monkeypatch):
    found = comparisons.benchmarks()
    found["everyday"] |= {"higher_is_better": False, "chance": None}
    scores = found["everyday"]["scores"]
    scores["teacher"], scores["system1"] = [0.2] * 200, [0.8] * 200
    monkeypatch.setattr(comparisons, "benchmarks", lambda: found)
    assert outcomes(compared()[0], "system1")["benchmark:everyday"] == "missed"


def test_what_is_below_is_named_with_its_target_and_what_is_not_is_not():
    comparison = comparisons.comparison()
    faults = below(comparison["students"])
    assert any(fault.startswith("System 1: Agreement with the teacher is ") for fault in faults)
    assert all("the target is " in fault for fault in faults)
    assert not any("In steps" in fault for fault in faults)
    with pytest.raises(ValueError, match=r"compare: System 1: .*set compare\.fail_below to false to go on"):
        require_targets(comparison)


def test_no_verdict_speaks_of_what_cannot_be_told_in_the_old_voice():
    text = str(comparisons.comparison()["students"])
    for phrase in ("wanted", "cannot be told", "flatter", "None%", "nan"):
        assert phrase not in text
