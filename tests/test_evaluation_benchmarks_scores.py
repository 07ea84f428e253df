"""A benchmark's intervals, against plain references in float64."""

import math

import numpy as np
import pytest

from distill_app.evaluation.benchmarks.scores import score_figure

Z = 1.959963984540054  # the normal distribution's 97.5th percentile


def wilson(right: int, count: int) -> tuple[float, float]:
    p = right / count
    middle = (p + Z**2 / (2 * count)) / (1 + Z**2 / count)
    reach = Z / (1 + Z**2 / count) * math.sqrt(p * (1 - p) / count + Z**2 / (4 * count**2))
    return middle - reach, middle + reach


@pytest.mark.parametrize(
    ("right", "count"), [(0, 1), (1, 1), (0, 60), (60, 60), (37, 60), (1, 1000), (730, 1000)]
)
def test_a_share_of_yes_has_wilsons_interval(right, count):
    found = score_figure(right / count, 0.5, [1.0] * right + [0] * (count - right))
    low, high = wilson(right, count)
    assert (found["value"], found["low"], found["high"]) == pytest.approx(
        (right / count, low, high), abs=1e-5
    )
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1


def test_other_scores_have_the_normal_approximation_of_their_standard_error():
    scores = np.random.default_rng(0).normal(3.0, 1.0, 50)
    stderr = scores.std(ddof=1) / math.sqrt(50)
    found = score_figure(float(scores.mean()), float(stderr), list(scores))
    expected = (scores.mean(), scores.mean() - Z * stderr, scores.mean() + Z * stderr)
    assert (found["value"], found["low"], found["high"]) == pytest.approx(expected, abs=1e-5)


def test_an_interval_of_shares_that_are_not_all_or_nothing_stays_within_0_and_1():
    assert score_figure(0.95, 0.1, [1.0, 0.9])["high"] == 1.0
    assert score_figure(0.05, 0.1, [0.0, 0.1])["low"] == 0.0
    assert score_figure(1.1, 0.1, [1.1, 1.1])["high"] == pytest.approx(1.1 + Z * 0.1, abs=1e-5)


def test_a_group_that_weighs_its_tasks_otherwise_than_by_questions_gets_no_wilson_interval():
    """Two tasks, 1 of 1 and 0 of 3 right, averaged by task."""
    found = score_figure(0.5, 0.1, [1, 0, 0, 0])
    assert (found["low"], found["high"]) == pytest.approx((0.5 - Z * 0.1, 0.5 + Z * 0.1), abs=1e-5)


@pytest.mark.parametrize("stderr", ["N/A", None, float("nan")])
def test_where_no_standard_error_is_known_there_is_no_interval(stderr):
    assert score_figure(12.5, stderr, [(3, 4), (1, 2)]) == {"value": 12.5, "low": None, "high": None}


def test_what_is_no_number_becomes_null():
    assert score_figure(math.inf, math.inf, []) == {"value": None, "low": None, "high": None}
