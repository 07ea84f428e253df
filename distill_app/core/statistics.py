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
    return _bootstrap(lambda x, axis=-1: x.mean(axis=axis), values)


def share(yes: Sequence[bool]) -> Figure:
    """Return the share of yes, with Wilson's interval, true near 0 and 1 too (Wilson 1927)."""
    from scipy.stats import binomtest

    if not yes:
        return plain(None)
    test = binomtest(sum(yes), len(yes))
    interval = test.proportion_ci(0.95, method="wilson")
    return figure(test.statistic, interval.low, interval.high)


def ratio(above: Sequence[float], below: Sequence[float]) -> Figure:
    """Return sum over sum of paired values, with a percentile bootstrap over the pairs.

    A side of the interval is None where it has no bound, as when many resamples have nothing below.
    """
    import numpy as np

    def statistic(a: Any, b: Any, axis: int = -1) -> Any:
        sums = np.asarray(a.sum(axis=axis), dtype=float), np.asarray(b.sum(axis=axis), dtype=float)
        # 0 / 0 tells nothing: it counts as no bound above
        return np.divide(*sums, out=np.full(sums[0].shape, np.inf), where=sums[1] != 0)

    return _bootstrap(statistic, above, below)


def difference(first: Sequence[float], second: Sequence[float]) -> Figure:
    """Return the mean of first minus second, paired, with a percentile bootstrap over the pairs."""
    return mean([a - b for a, b in zip(first, second, strict=True)])


def percentile(values: Sequence[float], percent: float) -> Figure:
    """Return a percentile, interpolated, without an interval."""
    import numpy as np

    return plain(float(np.percentile(values, percent)) if len(values) else None)


def _bootstrap(statistic: Callable[..., Any], *samples: Sequence[float]) -> Figure:
    import numpy as np
    from scipy.stats import bootstrap

    data = [np.asarray(sample, dtype=float) for sample in samples]
    if not len(data[0]):
        return plain(None)
    value = float(statistic(*data))
    if len(data[0]) == 1:
        return plain(value)
    with np.errstate(invalid="ignore"):  # resamples without a bound have no standard error; it is not used
        result = bootstrap(
            data,
            statistic,
            n_resamples=RESAMPLES,
            paired=True,
            vectorized=True,
            method="percentile",
            rng=np.random.default_rng(SEED),
        )
    found = result.confidence_interval
    return figure(value, float(found.low), float(found.high))


def _known(number: float | None) -> float | None:
    return float(f"{number:.6g}") if number is not None and math.isfinite(number) else None
