"""Figures with 95 % intervals over prompts, examples or questions."""

import math
from collections.abc import Sequence
from typing import Any

Figure = dict[str, float | None]  # value, low, high; low and high are None where no interval is known

TAIL = 0.025  # on each side of a 95 % interval
Z = 1.959963984540054  # the normal distribution's quantile of 1 - TAIL
RESAMPLES = 5000
DRAWS = 20_000
SEED = 17


def figure(value: float | None, low: float | None, high: float | None) -> Figure:
    """Return a figure; what is not finite becomes None, since JSON has no infinity, and six digits stay."""
    return {"value": _known(value), "low": _known(low), "high": _known(high)}


def plain(value: float | None) -> Figure:
    """Return a figure without an interval."""
    return figure(value, None, None)


def mean(values: Sequence[float]) -> Figure:
    """Return the mean with its interval; see `rate`."""
    return rate(values, [1] * len(values))


def share(yes: Sequence[bool]) -> Figure:
    """Return the share of yes, with Wilson's interval, true near 0 and 1 too (Wilson 1927)."""
    from scipy.stats import binomtest

    if not yes:
        return plain(None)
    test = binomtest(sum(yes), len(yes))
    interval = test.proportion_ci(0.95, method="wilson")
    return figure(test.statistic, interval.low, interval.high)


def paired_points(student: Sequence[float], teacher: Sequence[float]) -> Figure:
    """Return the mean of student minus teacher over the same questions, as a share (-1 to 1).

    Right and wrong answers (0 and 1) get Tango's score interval for a difference of paired proportions
    (Statistics in Medicine 17:891-908, 1998). It holds for any number of questions, and where no answers or
    all of them differ. Its score is corrected for continuity, see `half_step`.

    Graded scores (between 0 and 1) get Gaffke's interval for the mean of a bounded variable (Mathematical
    Methods of Statistics 14:451-467, 2005; Learned-Miller and Thomas, arXiv:1905.06208): quantiles of the
    mean under random weights, with one more question that the student loses by 1 for the low end, and wins
    by 1 for the high end. No case is known in which either end errs in more than 2.5 %. How often the low end
    lies above -0.05 where the truth is -0.05, in percent, simulated, beside a t interval and a BCa bootstrap:

        scores                           n = 20            n = 50            n = 200
                                       t  BCa Gaffke     t  BCa Gaffke     t  BCa Gaffke
        normal, spread 0.3             2    3    0       2    2    0       3    3    2
        a loss of 0.8 in 6 % of all   28   28    0      14    4    0       5    2    1
        skewed (beta)                 11    7    0       8    5    0       4    2    0

    Raises:
        ValueError: the lists differ in length, or a score is below 0 or above 1.
    """
    import numpy as np

    if len(student) != len(teacher):
        raise ValueError(
            f"paired_points: {len(student)} scores of the student, {len(teacher)} of the teacher;"
            " expected one of each for every question"
        )
    scores = np.asarray([student, teacher], dtype=float)
    count = scores.shape[1]
    if not count:
        return plain(None)
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(
            f"paired_points: scores lie between {scores.min():g} and {scores.max():g};"
            " expected 0 to 1; divide them by the best score"
        )
    gained = scores[0] - scores[1]
    if np.isin(scores, (0, 1)).all():
        better, worse = int((gained > 0).sum()), int((gained < 0).sum())
        low, high = _tango_low(better, worse, count), -_tango_low(worse, better, count)
    else:
        low, high = _gaffke(gained)
    return figure(float(gained.mean()), low, high)


def tango_excess(better: Any, worse: Any, count: int, difference: float) -> Any:
    """Return by how many questions a score statistic exceeds what chance leaves, under a true difference.

    Positive where the interval of `paired_points` lies above the difference: the numerator of Tango's
    equation 24 less the continuity correction, less 1.96 times its denominator.

    Args:
        better: questions that only the student got right; a number or an array.
        worse: questions that only the teacher got right; of the same shape.
        count: all questions.
        difference: student minus teacher, -1 to 1; -Delta in the paper.
    """
    import numpy as np

    # the root of the likelihood's equation: the share of `worse` if the difference is true (25 and 26)
    b = (2 * count - better + worse) * difference - better - worse
    c = -worse * difference * (1 - difference)
    only_teacher = (np.sqrt(np.maximum(b * b - 8 * count * c, 0)) - b) / (4 * count)
    spread = np.sqrt(np.maximum(count * (2 * only_teacher + difference * (1 - difference)), 0))
    return better - worse - count * difference - half_step(better, worse, count) - Z * spread


def half_step(better: Any, worse: Any, count: int) -> Any:
    """Return half the step between neighbouring values of better minus worse, the continuity correction.

    The step is 1, and 2 where every question is answered differently, as in Edwards' correction of McNemar's
    test (Psychometrika 13:185-187, 1948). How often the low end lies above -margin where the truth is
    -margin, at the worst share of differing answers, exact, in percent; without the correction in brackets
    (`python benchmarks/verdict.py`):

        margin      n = 20         n = 50         n = 100        n = 200        n = 1000
        0.05      1.95 (3.60)    2.10 (2.78)    2.46 (2.61)    2.38 (2.80)    2.46 (2.68)
        0.1       2.14 (2.64)    2.35 (2.67)    2.32 (2.84)    2.44 (2.78)    2.48 (2.64)

    From 5 to 1000 questions it stays below 2.5 % for these margins; at 0.2 it reaches 2.51 %, at 0.3 2.75 %.
    """
    import numpy as np

    return np.where(better + worse == count, 1.0, 0.5)


def unpaired_points(first: Sequence[bool], second: Sequence[bool]) -> Figure:
    """Return the difference of two shares over different questions, with a hybrid score interval.

    Source: Newcombe 1998, Statistics in Medicine 17:873-890, method 10.
    """
    one, other = share(first), share(second)
    if one["value"] is None or other["value"] is None:
        return plain(None)
    p1, l1, u1 = (float(one[key] or 0.0) for key in ("value", "low", "high"))
    p2, l2, u2 = (float(other[key] or 0.0) for key in ("value", "low", "high"))
    below, above = math.hypot(p1 - l1, u2 - p2), math.hypot(u1 - p1, p2 - l2)
    return figure(p1 - p2, p1 - p2 - below, p1 - p2 + above)


def rate(numerators: Sequence[float], tokens: Sequence[float], *, most: float | None = None) -> Figure:
    """Return the sum of the numerators over the sum of the tokens, with an interval over the prompts.

    The interval is as wide as Fieller's, see `_fieller`, but even on the scale of logarithms, and of log-odds
    where `most` is given, so that it stays above 0 and below `most`. With numerators below 0 it is Fieller's
    own. In how many of 100 cases it holds the truth, simulated with token counts whose logarithms have a
    spread of 0.6; a percentile bootstrap over the prompts in brackets:

        prompts   agreement 50 %   agreement 89 %   KL of a prompt gamma(2)   lognormal(0.8)
        20         95.0 (91.3)      94.4 (91.6)          94.1 (89.8)           91.3 (86.1)
        50         94.8 (93.5)      94.4 (91.6)          94.2 (92.2)           92.1 (90.5)

    Without tokens there is no value; where all prompts have the same rate there is no interval.

    Args:
        numerators: a sum over the tokens of each prompt.
        most: what a rate can be at most, as 1 for a share of tokens.
    """
    import numpy as np

    above, below = np.asarray(numerators, dtype=float), np.asarray(tokens, dtype=float)
    if not below.sum():
        return plain(None)
    value = float(above.sum() / below.sum())
    low, high = _fieller(above, below)
    if math.isfinite(low) and value and (above >= 0).all():
        share = value / most if most else 0.0
        reach = (high - low) / 2 / value
        factor = math.exp(min(reach / (1 - share), 700)) if share < 1 else 1.0
        low, high = value / (share + (1 - share) * factor), value / (share + (1 - share) / factor)
    found = figure(value, low, high)
    return plain(value) if found["low"] == found["high"] else found


def share_closed(student: Sequence[float], floor: Sequence[float], ceiling: Sequence[float]) -> Figure:
    """Return how far a student is from floor to ceiling, paired: 0 at the floor, 1 at the ceiling.

    (student - floor) / (ceiling - floor), summed over the same questions or prompts. With scores of the
    student after and before and of the teacher it is the share of the gap that is closed. Sums over the
    tokens of each prompt give a place weighed by tokens; the tokens cancel out, since all three are measured
    on the same ones. Higher is better: negate sums such as KL.

    The value is None where the ceiling is not above the floor with 97.5 % certainty: there is no gap. The
    interval is Fieller's; a side without a bound is None. Over tokens it holds the truth in 95 to 96 of 100
    cases with 20, 50 and 200 prompts; a percentile bootstrap in 89 to 95.

    Right and wrong answers crowd at their ends, and prompts without any spread. There the low end counts one
    more prompt that closes nothing of the gap, the high end one more that gains without a gap. A student that
    closes just less than 0.9 of the gap to a teacher that is always right has a low end above 0.9 in 3.2 % of
    cases with 50 questions, 2.2 % with 100 and 2.9 % with 200 (exact; else in 10.8, 5.4 and 5.2 %).
    """
    import numpy as np

    scores = np.asarray([student, floor, ceiling], dtype=float)
    gained, gap = scores[0] - scores[1], scores[2] - scores[1]
    low, high = _fieller(gained, gap)
    if not math.isfinite(low) or gap.mean() <= 0:
        return plain(None)
    value = float(gained.mean() / gap.mean())
    found = figure(value, low, high)
    answers = np.isin(scores, (0, 1)).all()
    if answers or found["low"] == found["high"]:
        size = 1.0 if answers else gap.mean()
        low, _ = _fieller(np.append(gained, 0.0), np.append(gap, size))
        _, high = _fieller(np.append(gained, size), np.append(gap, 0.0))
        found = figure(value, low, high)
    return found


def speed_ratio(student_sec: Sequence[Sequence[float]], teacher_sec: Sequence[Sequence[float]]) -> Figure:
    """Return how many times as fast as the teacher the student answers: the ratio of mean seconds an answer.

    The interval holds the spread of the prompts and the noise of the rounds. What slows a whole round slows
    both models and cancels out. What is left are the mean deviations of each prompt and of each round from
    the ratio. Each of the two gets Student's t with its own degrees of freedom, and the interval is that of
    their sum (Behrens and Fisher), on the scale of logarithms. So 2 rounds widen it much, 3 little. Without a
    second round or a second prompt there is no interval.

    In how many of 100 cases it holds the truth, and its half width, simulated: rounds drift by 10 % for both,
    each model's round by 3 % more, each answer by 3 % more; in brackets the cases of a bootstrap over prompts
    and rounds:

        prompts            2 rounds               3 rounds
        20, spread 0.5    99 +-43 % (91)         96 +-27 % (93)
        50, spread 0.5    99 +-35 % (92)         97 +-19 % (93)
        200, spread 0.5                          98 +-12 % (92)
        200, spread 0.1   95 +-31 % (65)         96 +-10 % (80)

    Args:
        student_sec: seconds an answer, `(rounds, prompts)`.
        teacher_sec: the same prompts in the same rounds.

    Raises:
        ValueError: the two differ in shape.
    """
    import numpy as np

    student, teacher = np.asarray(student_sec, dtype=float), np.asarray(teacher_sec, dtype=float)
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(
            f"speed_ratio: seconds of shape {student.shape} and {teacher.shape};"
            " expected (rounds, prompts) twice, the same"
        )
    rounds, prompts = student.shape
    if not student.sum():
        return plain(None)
    value = float(teacher.mean() / student.mean())
    if rounds < 2 or prompts < 2:
        return plain(value)
    deviation = (teacher - value * student) / teacher.mean()
    rng = np.random.default_rng(SEED)
    error = sum(
        math.sqrt(means.var(ddof=1) / len(means)) * rng.standard_t(len(means) - 1, DRAWS)
        for means in (deviation.mean(axis=0), deviation.mean(axis=1))
    )
    reach = math.exp(float(np.quantile(np.abs(error), 1 - 2 * TAIL)))
    return figure(value, value / reach, value * reach)


def prompts_needed(found: Figure, threshold: float, count: int) -> int | None:
    """Return how many prompts would decide on which side of the threshold a figure is, if its value stays.

    An interval shrinks with the root of the prompts, so count x (reach / distance)^2, rounded up to two
    digits; reach is the distance from the value to the bound on the threshold's side. None where the value
    is the threshold, or unknown, or that bound is.
    """
    value = found["value"]
    if value is None or value == threshold:
        return None
    bound = found["low"] if threshold < value else found["high"]
    if bound is None:
        return None
    needed = max(1, math.ceil(round(count * ((bound - value) / (threshold - value)) ** 2, 6)))
    unit = 10 ** max(0, len(str(needed)) - 2)
    return -(-needed // unit) * unit


def _tango_low(better: int, worse: int, count: int) -> float:
    """Return the low end of Tango's interval: where the excess changes its sign, -1 where it never does."""
    from scipy.optimize import brentq

    def excess(difference: float) -> float:
        return float(tango_excess(better, worse, count, difference))

    return float(brentq(excess, -1, (better - worse) / count)) if excess(-1) > 0 else -1.0


def _gaffke(gained: Any) -> tuple[float, float]:
    """Return the interval of a mean of values between -1 and 1; see `paired_points`."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    weights = rng.standard_exponential((RESAMPLES, len(gained) + 1), dtype=np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    values = np.asarray(gained, dtype=np.float32)
    low, high = (weights @ np.append(values, np.float32(end)) for end in (-1, 1))
    return float(np.quantile(low, TAIL)), float(np.quantile(high, 1 - TAIL))


def _fieller(above: Any, below: Any) -> tuple[float, float]:
    """Return the interval of a ratio of paired means (Fieller, J. R. Stat. Soc. B 16:175-185, 1954).

    It holds every ratio r at which the mean of above - r x below does not differ from 0, by a t test over the
    pairs. It is infinite where the mean of `below` may be 0, and with fewer than two pairs.
    """
    import numpy as np
    from scipy.special import stdtrit

    count = len(below)
    if count < 2 or not below.mean():
        return -math.inf, math.inf
    t2 = float(stdtrit(count - 1, 1 - TAIL)) ** 2
    # about the estimate, so that no digits cancel where all pairs have the same ratio
    rest = above - above.mean() / below.mean() * below
    (spread, shared), (_, below_spread) = t2 * np.cov(rest, below) / count
    clear = below.mean() ** 2 - below_spread
    if clear <= 0:
        return -math.inf, math.inf
    reach = math.sqrt(shared**2 + clear * spread)
    value = above.mean() / below.mean()
    return float(value + (-shared - reach) / clear), float(value + (-shared + reach) / clear)


def _known(number: float | None) -> float | None:
    return float(f"{number:.6g}") if number is not None and math.isfinite(number) else None
