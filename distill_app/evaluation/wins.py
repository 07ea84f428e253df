"""How often a student wins before a judge, whatever the length of its answers.

A pair's two replies, the student's answer in either place, make one score: 1 where both say it won, 0 where
both say it lost, else 0.5, as MT-bench counts them (arXiv:2306.05685, section 3.4).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from distill_app.evaluation import statistics
from distill_app.evaluation.statistics import Figure

Rows = Sequence[Mapping[str, Any]]
WON = {("won", "won"): 1.0, ("lost", "lost"): 0.0}
RIDGE = 1.0  # on the length's weight: keeps it finite where length alone tells who wins
STEPS = 50  # of Newton's method, which takes few


def pair_score(ways: Sequence[str]) -> float | None:
    """Return 1, 0.5 or 0 for how the two orders of a pair ended; None where a reply could not be read."""
    if "unread" in ways:
        return None
    return WON.get((ways[0], ways[1]), 0.5)


def unread_pairs(rows: Rows, name: str, opponent: str) -> int:
    """Count the pairs of which a reply could not be read."""
    return sum("unread" in row[name]["judged"][opponent] for row in rows)


def win_rate(rows: Rows, name: str, opponent: str) -> Figure:
    """Return the share of pairs that a student wins, ties half; pairs that were not read are left out."""
    return statistics.rate(*_ones(_scores(rows, name, opponent)[0]), most=1)


def length_controlled(rows: Rows, name: str, opponent: str) -> Figure:
    """Return the share of pairs that a student would win if its answers were as long as its opponent's.

    A logistic regression of the pair's score on the difference of lengths in tokens, as tanh of it over its
    standard deviation, read off where that is zero. The interval is that of the regression's constant.

    Source: Dubois et al. 2024, arXiv:2404.04475, without its terms for the model and the prompt, for which
    there are too few pairs here.
    """
    import numpy as np

    scores, lengths = _scores(rows, name, opponent)
    if not scores:
        return statistics.plain(None)
    longer = np.asarray(lengths, dtype=float)
    spread = longer.std()
    x = np.column_stack([np.ones(len(longer)), np.tanh(longer / spread) if spread else 0 * longer])
    y = np.asarray(scores)
    # Half a win and half a loss at equal length keep the constant finite where all pairs ended alike
    x, y = np.vstack([x, [[1.0, 0.0], [1.0, 0.0]]]), np.append(y, [0.75, 0.25])
    weights, spread_of = _fitted(x, y)
    constant, reach = weights[0], 1.959964 * spread_of
    low, value, high = (1 / (1 + np.exp(-one)) for one in (constant - reach, constant, constant + reach))
    return statistics.figure(float(value), float(low), float(high))


def position_bias(rows: Rows, name: str) -> Figure:
    """Return the share of read pairs in which the judge chose the same place in both orders."""
    ways = [tuple(pair) for row in rows for pair in row[name]["judged"].values() if "unread" not in pair]
    return statistics.share([pair in (("won", "lost"), ("lost", "won")) for pair in ways])


def _scores(rows: Rows, name: str, opponent: str) -> tuple[list[float], list[int]]:
    """Return the scores of the pairs that were read, and how many tokens the student's answer is longer."""
    other = "teacher" if opponent == "teacher" else f"{name}_before"
    found = [
        (score, row[name]["tokens"] - row[other]["tokens"])
        for row in rows
        if (score := pair_score(row[name]["judged"][opponent])) is not None
    ]
    return [score for score, _ in found], [longer for _, longer in found]


def _ones(values: Sequence[float]) -> tuple[Sequence[float], list[float]]:
    return values, [1.0] * len(values)


def _fitted(x: Any, y: Any) -> tuple[Any, float]:
    """Return the weights of a logistic regression with a ridge on the second, and the first one's error.

    The error is the sandwich estimate, since scores of a half spread less than a coin.
    """
    import numpy as np

    penalty = np.diag([0.0, RIDGE])
    weights = np.zeros(2)
    for _ in range(STEPS):
        chance = 1 / (1 + np.exp(-x @ weights))
        slope = x.T @ (y - chance) - penalty @ weights
        curve = x.T @ (x * (chance * (1 - chance))[:, None]) + penalty
        step = np.linalg.solve(curve, slope)
        weights = weights + step
        if np.abs(step).max() < 1e-10:
            break
    bread = np.linalg.inv(curve)
    meat = x.T @ (x * ((y - chance) ** 2)[:, None])
    return weights, float(np.sqrt((bread @ meat @ bread)[0, 0]))
