import math

import numpy as np
import pytest
from scipy.stats import binom

from distill_app.core import statistics


def wilson(k: int, n: int) -> tuple[float, float]:
    """The closed form, in float64 (Wilson 1927)."""
    z, p = 1.959963984540054, k / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


@pytest.mark.parametrize(("k", "n"), [(0, 50), (2, 50), (20, 50), (50, 50), (1, 1)])
def test_a_share_has_wilsons_interval(k, n):
    found = statistics.share([True] * k + [False] * (n - k))
    low, high = wilson(k, n)
    assert found["value"] == pytest.approx(k / n)
    assert found["low"] == pytest.approx(low, abs=1e-5) and found["high"] == pytest.approx(high, abs=1e-5)


def test_a_mean_has_an_interval_near_the_normal_one():
    values = list(np.random.default_rng(0).normal(3, 1, 400))
    found = statistics.mean(values)
    half = 1.96 * np.std(values) / 20
    assert found["value"] == pytest.approx(np.mean(values), rel=1e-5)
    assert found["low"] == pytest.approx(np.mean(values) - half, abs=0.02)
    assert found["high"] == pytest.approx(np.mean(values) + half, abs=0.02)


def test_a_bootstrap_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        below = rng.exponential(1, 60)
        above = 2 * below + rng.normal(0, 0.3, 60)  # paired: the ratio of sums is 2
        found = statistics.ratio(list(above), list(below))
        hits += found["low"] <= 2 <= found["high"]
    assert 180 <= hits <= 199


def test_pairs_stay_together_when_they_are_resampled():
    below = [1.0, 10.0, 100.0, 1000.0]
    found = statistics.ratio([2.0 * x + x % 3 / 1000 for x in below], below)
    assert found["value"] == pytest.approx(2, abs=0.01)
    assert 2 <= found["low"] < found["high"] < 2.01


@pytest.mark.parametrize(
    "found",
    [
        statistics.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]),
        statistics.mean([100.0] * 50),
        statistics.difference([2.0, 12.0, 102.0], [1.0, 11.0, 101.0]),
    ],
)
def test_where_resampling_knows_no_spread_there_is_no_interval(found):
    assert found["value"] is not None and found["low"] is found["high"] is None


@pytest.mark.parametrize(("n", "least"), [(2, 0.0), (20, 0.8), (100, 0.95)])
def test_being_right_everywhere_leaves_a_doubt_that_shrinks(n, least):
    found = statistics.ratio([1.0] * n, [1.0] * n, most=1)
    assert found["value"] == 1 and least <= found["low"] < 1
    assert n == 2 or found["high"] > 1  # of 2 and one more, resamples without a right teacher are many
    gain = statistics.difference([1.0] * n, [1.0] * n, most=1)
    assert gain["value"] == 0 and gain["low"] < 0 < gain["high"] == -gain["low"]


def test_being_right_nowhere_leaves_one_too():
    found = statistics.ratio([0.0] * 50, [1.0] * 50, most=1)
    assert found["value"] == found["low"] == 0 and 0.03 < found["high"] < 0.1


def test_scores_away_from_their_ends_are_resampled_as_they_are():
    above, below = [30.0, 40.0, 50.0, 100.0], [100.0] * 4
    assert statistics.ratio(above, below, most=100) == statistics.ratio(above, below)


@pytest.mark.parametrize("wanted", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("n", [20, 50, 100])
def test_a_student_just_below_the_threshold_is_seldom_thought_to_reach_it(n, wanted):
    """Of a teacher that is always right, where plain resampling errs most; the chance is exact."""
    chance = 0.0
    for right in range(math.ceil(wanted * n), n + 1):
        low = statistics.ratio([1.0] * right + [0.0] * (n - right), [1.0] * n, most=1)["low"]
        if low >= wanted:
            chance += binom.pmf(right, n, wanted - 0.001)
    assert chance < 0.035  # nominal 0.025; without the further prompt up to 0.13


def test_the_same_values_give_the_same_interval():
    values = [1.0, 2.0, 5.0, 9.0]
    assert statistics.mean(values) == statistics.mean(values)


def test_a_ratio_to_little_has_no_bound_above():
    teacher, student = [1.0] + [0.0] * 9, [1.0] * 5 + [0.0] * 5
    found = statistics.ratio(student, teacher)
    assert found["value"] == 5 and found["high"] is None and found["low"] > 0


def test_a_ratio_to_nothing_is_unknown():
    assert statistics.ratio([1.0] * 30, [0.0] * 30, most=1) == {"value": None, "low": None, "high": None}
    assert statistics.ratio([1.0, 0.0], [0.0, 0.0]) == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize("values", [[], [3.0]])
def test_too_few_values_have_no_interval(values):
    found = statistics.mean(values)
    assert found == {"value": values[0] if values else None, "low": None, "high": None}


def test_a_gain_is_that_of_the_pairs():
    found = statistics.difference([2.0, 12.0, 102.5], [1.0, 11.0, 101.0])
    assert found["value"] == pytest.approx(7 / 6, rel=1e-5) and found["low"] == 1.0 and found["high"] == 1.5


def test_percentiles_are_interpolated():
    assert statistics.percentile([1.0, 2.0, 3.0, 4.0], 50)["value"] == 2.5
    assert statistics.percentile([], 50)["value"] is None


def test_a_loss_is_that_of_all_tokens_and_its_interval_comes_from_the_examples():
    losses = [(2.0, 1), (30.0, 10), (9.0, 3), (100.0, 50)]
    found = statistics.ratio(*zip(*losses, strict=True))
    assert found["value"] == pytest.approx(141 / 64, abs=1e-4)
    assert 2 <= found["low"] < found["value"] < found["high"] <= 3
    assert statistics.ratio(*zip(*losses, strict=True)) == found
    wider = statistics.ratio([10 * nats for nats, _ in losses], [n for _, n in losses])
    assert wider["high"] - wider["low"] == pytest.approx(10 * (found["high"] - found["low"]), rel=0.01)
    assert statistics.ratio([4.0], [2]) == {"value": 2.0, "low": None, "high": None}
