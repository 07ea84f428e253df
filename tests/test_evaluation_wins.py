"""Wins before a judge, whatever the length of the answers."""

import pytest

from distill_app.evaluation.wins import length_controlled, pair_score, position_bias, unread_pairs, win_rate


def rows_of(pairs: list[tuple[list[str], int, int]]) -> list[dict]:
    return [
        {"teacher": {"tokens": teacher}, "system1": {"tokens": own, "judged": {"teacher": ways}}}
        for ways, own, teacher in pairs
    ]


WON, LOST, SPLIT, UNREAD = ["won", "won"], ["lost", "lost"], ["won", "lost"], ["unread", "won"]


@pytest.mark.parametrize(
    ("ways", "score"),
    [(WON, 1.0), (LOST, 0.0), (SPLIT, 0.5), (["tied", "won"], 0.5), (["tied", "tied"], 0.5), (UNREAD, None)],
)
def test_a_pair_is_won_where_both_orders_say_so(ways, score):
    assert pair_score(ways) == score


def test_pairs_that_were_not_read_are_left_out():
    rows = rows_of([(WON, 5, 5), (LOST, 5, 5), (WON, 5, 5), (UNREAD, 5, 5)])
    assert win_rate(rows, "system1", "teacher")["value"] == pytest.approx(2 / 3, rel=1e-5)
    assert unread_pairs(rows, "system1", "teacher") == 1


def test_a_judge_that_only_likes_length_gives_nobody_an_advantage():
    longer = [(WON, 60 + n, 40) for n in range(45)]
    shorter = [(LOST, 30 - n % 9, 40) for n in range(5)]
    rows = rows_of(longer + shorter)
    assert win_rate(rows, "system1", "teacher")["value"] == 0.9
    controlled = length_controlled(rows, "system1", "teacher")
    assert controlled["value"] < 0.75 and controlled["low"] < 0.5


def test_at_equal_lengths_the_rate_is_the_plain_one_with_one_pair_of_doubt():
    rows = rows_of([(WON, 5, 5)] * 30 + [(LOST, 5, 5)] * 10)
    assert length_controlled(rows, "system1", "teacher")["value"] == pytest.approx(31 / 42, abs=1e-3)


def test_to_swap_the_two_mirrors_the_rate():
    pairs = [(WON, 50 + n, 40) for n in range(20)] + [(LOST, 45 - n, 40) for n in range(12)]
    mirrored = [(LOST if ways == WON else WON, teacher, own) for ways, own, teacher in pairs]
    one, other = (length_controlled(rows_of(p), "system1", "teacher") for p in (pairs, mirrored))
    assert one["value"] == pytest.approx(1 - other["value"], abs=1e-5)
    assert one["low"] == pytest.approx(1 - other["high"], abs=1e-5)


def test_pairs_that_all_ended_alike_leave_a_doubt():
    found = length_controlled(rows_of([(WON, 40 + n, 40) for n in range(30)]), "system1", "teacher")
    assert 0.5 < found["low"] < found["value"] < found["high"] <= 1


def test_without_a_pair_there_is_no_rate():
    assert length_controlled([], "system1", "teacher")["value"] is None


def test_a_judge_that_always_takes_the_first_place_is_biased():
    assert position_bias(rows_of([(SPLIT, 5, 5)] * 20), "system1")["value"] == 1
    assert position_bias(rows_of([(WON, 5, 5)] * 20), "system1")["value"] == 0
