"""Say how sure a mean or a share is: intervals by the bootstrap, Student's t and Wilson's score.

Scores, ablations, the paper's acceptance test and the finals of a sweep take intervals from here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy as np

from kvsharer_exp.values.finite import check_finite

CONFIDENCE = 0.95


RESAMPLES = 10_000


_CHUNK = 1 << 20  # numbers drawn at a time


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and the range from ``low`` to ``high`` in which it probably lies."""

    mean: float
    low: float
    high: float

    def within(self, least: float, most: float) -> Interval:
        """The interval without what lies outside of the bounds of its values.

        A mean outside of the bounds shows that the values are on another scale; nothing is cut.
        """
        if not least <= self.mean <= most:
            return self
        return Interval(self.mean, max(least, self.low), min(most, self.high))


def bootstrap(
    values: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of the mean of ``values``.

    It is too narrow for fewer than about 15 values.

    Raises:
        ValueError: there are no values.
    """
    low, high = quantiles(resampled_means(values, resamples, seed), confidence)
    return Interval(fmean(values), low, high)


def resampled_means(values: Sequence[float], resamples: int, seed: int) -> np.ndarray:
    """The means of ``resamples`` samples of ``values``, drawn with replacement: (resamples,).

    Raises:
        ValueError: there are no values.
    """
    check_finite("items to resample", values)
    data = np.asarray(values, dtype=np.float64)
    if not data.size:
        raise ValueError("no values to resample: give at least one")
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // data.size)
    return np.concatenate(
        [
            data[rng.integers(data.size, size=(min(rows, resamples - done), data.size))].mean(1)
            for done in range(0, resamples, rows)
        ]
    )


def quantiles(means: np.ndarray, confidence: float) -> tuple[float, float]:
    """The lowest and highest of the middle ``confidence`` of ``means``."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of two or more ``values``."""
    return stdev(values) / math.sqrt(len(values))


def t_interval(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """Student's t interval of the mean of a few draws.

    Raises:
        ValueError: there are fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} values have no spread: give at least two")
    check_finite("draws", values)
    half = t_quantile(confidence, len(values) - 1) * standard_error(values)
    mean = fmean(values)
    return Interval(mean, mean - half, mean + half)


def ratio_interval(
    values: Sequence[float], references: Sequence[float], *, confidence: float = CONFIDENCE
) -> Interval:
    """The geometric mean of ``values`` over ``references``, pair by pair, with its interval.

    The interval is Student's t of the logarithms, so it is the same for the inverse ratio.

    Raises:
        ValueError: there are fewer than two pairs, the two differ in length, or one is not above 0.
    """
    ratios = [value / reference for value, reference in zip(values, references, strict=True)]
    inside = t_interval([math.log(ratio) for ratio in ratios], confidence=confidence)
    return Interval(*map(math.exp, (inside.mean, inside.low, inside.high)))


def t_within(t: float, freedom: int) -> float:
    """P(|T| < t) for Student's t with ``freedom`` degrees of freedom, a whole number.

    Abramowitz & Stegun 26.7.3, 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= (k - 1) / k * cosine * cosine
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def t_quantile(confidence: float, freedom: int) -> float:
    """Find by bisection the t with P(|T| < t) = ``confidence``, the inverse of `t_within`."""
    low, high = 0.0, 1.0
    while t_within(high, freedom) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < confidence else (low, middle)
    return high


def wilson(successes: float, items: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of the share of 0/1 items that are 1.

    https://doi.org/10.2307/2276774

    Raises:
        ValueError: there are no items.
    """
    if items < 1:
        raise ValueError("no items: a share needs at least one")
    z, share = z_quantile(confidence), successes / items
    middle = (share + z * z / (2 * items)) / (1 + z * z / items)
    half = z / (1 + z * z / items)
    half *= math.sqrt(share * (1 - share) / items + z * z / (4 * items * items))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def half_width(values: Sequence[float], limit: int, *, confidence: float = CONFIDENCE) -> float:
    """Half the width of the interval that the mean of ``limit`` items like these would have.

    Raises:
        ValueError: there are no values, there is only one and it is not 0 or 1, or all are 0 or 1
            and ``limit`` is below one.
    """
    check_finite("items", values)
    if is_binary(values):
        interval = wilson(fmean(values) * limit, limit, confidence=confidence)
        return (interval.high - interval.low) / 2
    return z_quantile(confidence) * stdev(values) / math.sqrt(limit)


def is_binary(values: Sequence[float]) -> bool:
    """Whether all ``values`` are 0 or 1."""
    return all(value in (0, 1) for value in values)


def z_quantile(confidence: float) -> float:
    """The z with P(|Z| < z) = ``confidence`` for a standard normal Z."""
    return NormalDist().inv_cdf((1 + confidence) / 2)
