"""A task's score with its 95 % interval."""

import math
from collections.abc import Sequence
from typing import Any

from distill_app.evaluation import statistics

LEVEL = 0.95


def score_figure(value: float, stderr: Any, scores: Sequence[Any]) -> statistics.Figure:
    """Return a score with its interval.

    The interval is Wilson's (1927) where the score is the share of questions that got a yes, as `acc` is: it
    keeps its coverage near 0 and 1. Else it is the normal approximation from lm-eval's standard error, kept
    within 0 and 1 if each question's score is.

    Args:
        value: the task's or group's score.
        stderr: lm-eval's standard error of it; no number ("N/A") where it knows none.
        scores: each question's score under the same metric; some metrics have none that is a number.
    """
    from scipy.stats import norm

    if _is_share(value, scores):
        return statistics.share([bool(score) for score in scores])
    if not isinstance(stderr, (int, float)):
        return statistics.plain(value)
    reach = float(norm.ppf((1 + LEVEL) / 2)) * stderr
    low, high = value - reach, value + reach
    if scores and all(is_number(score) and 0 <= score <= 1 for score in scores):
        low, high = max(low, 0.0), min(high, 1.0)
    return statistics.figure(value, low, high)


def _is_share(value: float, scores: Sequence[Any]) -> bool:
    """Tell whether the value is the mean of scores that are 0 or 1; a group may weigh its tasks otherwise."""
    yes_or_no = bool(scores) and all(is_number(score) and score in (0, 1) for score in scores)
    return yes_or_no and math.isclose(math.fsum(scores) / len(scores), value, abs_tol=1e-9)


def is_number(score: Any) -> bool:
    """Tell whether a question's score is a number; some metrics have texts or lists."""
    return isinstance(score, (int, float))
