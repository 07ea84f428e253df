"""Figures with 95 % intervals over prompts, examples or questions."""

import math
from collections.abc import Callable, Sequence
from typing import Any

Figure = dict[str, float | None]  # value, low, high; low and high are None where no interval is known

RESAMPLES = 5000
SEED = 17


def figure(value: float | None, low: float | None, high: float | None) -> Figure:
    """Return a figure; what is not finite becomes None, since JSON has no infinity, and six digits stay."""
    return {"value": _known(value), "low": _known(low), "high": _known(high)}


def plain(value: float | None) -> Figure:
    """Return a figure without an interval."""
    return figure(value, None, None)


def mean(values: Sequence[float]) -> Figure:
    """Return the mean, with a percentile bootstrap over the values."""
    return _bootstrap(lambda x, axis=-1: x.mean(axis=axis), [values])


def share(yes: Sequence[bool]) -> Figure:
    """Return the share of yes, with Wilson's interval, true near 0 and 1 too (Wilson 1927)."""
    from scipy.stats import binomtest

    if not yes:
        return plain(None)
    test = binomtest(sum(yes), len(yes))
    interval = test.proportion_ci(0.95, method="wilson")
    return figure(test.statistic, interval.low, interval.high)


def ratio(above: Sequence[float], below: Sequence[float], *, most: float | None = None) -> Figure:
    """Return sum over sum of paired values, with a percentile bootstrap over the pairs.

    A side of the interval is None where it has no bound, as when many resamples have nothing below.

    Args:
        most: what a value can be at most, for scores that crowd at their ends; see `_with_doubt`.
    """
    import numpy as np

    def statistic(a: Any, b: Any, axis: int = -1) -> Any:
        sums = np.asarray(a.sum(axis=axis), dtype=float), np.asarray(b.sum(axis=axis), dtype=float)
        # 0 / 0 tells nothing: it counts as no bound above
        return np.divide(*sums, out=np.full(sums[0].shape, np.inf), where=sums[1] != 0)

    return _bootstrap(statistic, [above, below], most)


def difference(first: Sequence[float], second: Sequence[float], *, most: float | None = None) -> Figure:
    """Return the mean of first minus second, paired, with a percentile bootstrap over the pairs.

    Args:
        most: what a value can be at most, for scores that crowd at their ends; see `_with_doubt`.
    """
    return _bootstrap(lambda a, b, axis=-1: (a - b).mean(axis=axis), [first, second], most)


def percentile(values: Sequence[float], percent: float) -> Figure:
    """Return a percentile, interpolated, without an interval."""
    import numpy as np

    return plain(float(np.percentile(values, percent)) if len(values) else None)


def _bootstrap(
    statistic: Callable[..., Any], samples: Sequence[Sequence[float]], most: float | None = None
) -> Figure:
    """Return a statistic of paired samples; without an interval where resampling knows no spread."""
    import numpy as np

    data = np.asarray(samples, dtype=float)
    if not data.shape[1]:
        return plain(None)
    value = float(statistic(*data))
    if data.shape[1] == 1 or not math.isfinite(value):
        return plain(value)
    worse, better = _with_doubt(data, most)
    found = figure(value, _limits(statistic, worse)[0], _limits(statistic, better)[1])
    return plain(value) if found["low"] == found["high"] else found


def _with_doubt(data: Any, most: float | None) -> tuple[Any, Any]:
    """Return the pairs from which the interval's low end comes, and those from which its high end comes.

    Where all values are 0 or `most`, as right and wrong answers are, resampling sees too little spread, and
    none where all are right. So the low end comes from the data and one more pair on which the first failed
    and the second did not, the high end from the data and one more pair the other way round: as Clopper and
    Pearson count one more failure and one more success (1934). Else both come from the data.

    How often a student that keeps just less than a threshold (by 0.001) of what its teacher always gets right
    has a low end above the threshold, in percent, nominal 2.5; resampling the data alone gives the number in
    brackets:

        threshold      n = 20        n = 50        n = 100       n = 200
        0.8          1.1 (6.8)     1.8 (4.6)     2.4 (4.5)     2.6 (4.0)
        0.9          0.0 (11.9)    3.2 (10.8)    2.2 (5.4)     2.9 (5.2)
        0.95         0.0 (35.1)    0.0 (7.3)     3.4 (11.0)    2.3 (5.5)
    """
    import numpy as np

    if most is None or len(data) == 1 or not np.isin(data, (0, most)).all():
        return data, data
    return np.column_stack([data, (0, most)]), np.column_stack([data, (most, 0)])


def _limits(statistic: Callable[..., Any], data: Any) -> tuple[float, float]:
    """Return the 2.5th and the 97.5th percentile of the statistic over resamples of the pairs."""
    import numpy as np
    from scipy.stats import bootstrap

    with np.errstate(invalid="ignore"):  # resamples without a bound have no standard error; it is not used
        result = bootstrap(
            tuple(data),
            statistic,
            n_resamples=RESAMPLES,
            paired=True,
            vectorized=True,
            method="percentile",
            rng=np.random.default_rng(SEED),
        )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _known(number: float | None) -> float | None:
    return float(f"{number:.6g}") if number is not None and math.isfinite(number) else None
