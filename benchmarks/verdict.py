"""Prints how often the verdict on right answers errs, and how often it can decide, exactly.

python benchmarks/verdict.py

Answers are right or wrong, so all that counts is how many questions only the student gets right and how many
only the teacher: every pair of counts is enumerated, none is drawn. The differing answers are the questions
that just one of the two gets right, in percent of all; how many both get right changes nothing.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.special import gammaln, xlogy

from distill_app.evaluation.statistics import half_step, tango_excess

COUNTS = (20, 50, 100, 200, 1000)
MARGINS = (0.05, 0.1)
DIFFERING = (*np.arange(0.12, 1, 0.04), 0.97, 0.98, 0.99, 1.0)
STUDENTS = (("equal", 0.0, (0.0, 0.1, 0.2, 0.3)), ("20 less", -0.2, (0.2, 0.3, 0.4)))


def main() -> None:
    """Print both tables."""
    print("False met: the worst over all shares of differing answers, in %, nominal 2.5")
    print("margin  questions  Tango  with the continuity correction  0.1 points below the margin")
    for margin in MARGINS:
        for count in COUNTS:
            worst = [max(row[which] for row in false_met(count, margin)) for which in range(3)]
            print(f"{margin:<6g}  {count:9}  {worst[0]:5.2f}  {worst[1]:30.2f}  {worst[2]:27.2f}")
    print()
    print("The outcome at a margin of 10 points, in %")
    print("student  questions  differing answers    met  missed  cannot tell")
    for name, difference, shares in STUDENTS:
        for count in (50, 100, 200, 500, 1000):
            for differing in shares:
                met, missed = outcomes(count, differing, difference, 0.1)
                rest = abs(100 - met - missed)
                print(f"{name:>7}  {count:9}  {differing:17.0%}  {met:5.1f}  {missed:6.1f}  {rest:11.1f}")


def false_met(count: int, margin: float) -> Iterator[tuple[float, float, float]]:
    """Yield for each share of differing answers how often a student below the margin is "met", in percent.

    The three: by Tango's interval as published and by ours, where the student is worse by just the margin;
    by ours where it is worse by 0.1 points more. The first share is the smallest that allows the difference.
    """
    better, worse = tables(count)
    excess = tango_excess(better, worse, count, -margin)
    ours, published = excess > 0, excess + half_step(better, worse, count) > 0
    for differing in (margin, *DIFFERING):
        # no cell beyond what `published` meets is met: its chances are not needed
        chances = probabilities(better[published], worse[published], count, -margin, differing)
        lower = probabilities(
            better[ours], worse[ours], count, -margin - 0.001, max(differing, margin + 0.001)
        )
        yield 100 * chances.sum(), 100 * chances[ours[published]].sum(), 100 * lower.sum()


def outcomes(count: int, differing: float, difference: float, margin: float) -> tuple[float, float]:
    """Return how often a student is met and missed at a margin, in percent.

    Args:
        differing: share of questions that just one of the two gets right.
        difference: student minus teacher, as a share.
    """
    better, worse = tables(count)
    chances = probabilities(better, worse, count, difference, differing)
    met = tango_excess(better, worse, count, -margin) > 0
    missed = tango_excess(worse, better, count, margin) > 0  # the high end, by symmetry
    return 100 * float(chances[met].sum()), 100 * float(chances[missed].sum())


def tables(count: int) -> tuple[Any, Any]:
    """Return all numbers of questions that only the student and only the teacher can get right."""
    better, worse = np.indices((count + 1, count + 1)).reshape(2, -1)
    possible = better + worse <= count
    return better[possible], worse[possible]


def probabilities(better: Any, worse: Any, count: int, difference: float, differing: float) -> Any:
    """Return the probability of each pair of counts."""
    shares = ((differing + difference) / 2, (differing - difference) / 2, 1 - differing)
    logarithm = gammaln(count + 1.0)
    for cell, share in zip((better, worse, count - better - worse), shares, strict=True):
        logarithm = logarithm + xlogy(cell, max(share, 0.0)) - gammaln(cell + 1.0)
    return np.exp(logarithm)


if __name__ == "__main__":
    main()
