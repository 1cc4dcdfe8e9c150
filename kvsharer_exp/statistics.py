"""How sure a difference is: paired comparisons of two maps on the same items, and intervals.

Items are whatever was scored one by one: 0/1 answers, log-likelihoods of windows or texts, draws of
a random arm. Everything is seeded or exact; nothing knows what is compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
_CHUNK = 1 << 20  # numbers drawn at a time


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and where it may lie."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Mean of a - b on the same items, its interval, and how probable more than that is by chance.

    ``test``: ``mcnemar``, ``bootstrap``, or ``t`` (over draws).
    """

    difference: float
    low: float
    high: float
    p_value: float
    items: int
    test: str


def compare(
    a: Sequence[float],
    b: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Two maps on the same items: McNemar's exact test where all are 0 or 1, else the bootstrap.

    The interval is the bootstrap's in both cases.

    Raises:
        ValueError: no items, or not the same number of them.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    means = _resampled_means(differences, resamples, seed)
    low, high = _quantiles(means, confidence)
    if is_binary(a) and is_binary(b):
        p_value, test = mcnemar(a, b), "mcnemar"
    else:
        p_value, test = _bootstrap_p(means, len(differences)), "bootstrap"
    return Comparison(fmean(differences), low, high, p_value, len(differences), test)


def compare_draws(
    draws: Sequence[float], reference: float, *, confidence: float = CONFIDENCE
) -> Comparison:
    """Draws of a random arm against one fixed score: Student's t over the draws.

    Raises:
        ValueError: fewer than two draws.
    """
    inside = t_interval([draw - reference for draw in draws], confidence=confidence)
    spread = standard_error(draws)
    if spread:
        p_value = 1 - t_within(abs(inside.mean) / spread, len(draws) - 1)
    else:
        p_value = 0.0 if inside.mean else 1.0
    return Comparison(inside.mean, inside.low, inside.high, p_value, len(draws), "t")


def mcnemar(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided exact p: are items that only a gets right as many as those only b gets right?

    https://doi.org/10.1007/BF02295996; exact: binomial(discordant items, 1/2).
    """
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    discordant = only_a + only_b
    tail = sum(math.comb(discordant, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def bootstrap(
    values: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of the mean; too narrow below some 15 items.

    Raises:
        ValueError: no values.
    """
    low, high = _quantiles(_resampled_means(values, resamples, seed), confidence)
    return Interval(fmean(values), low, high)


def _resampled_means(values: Sequence[float], resamples: int, seed: int) -> np.ndarray:
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


def _quantiles(means: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _bootstrap_p(means: np.ndarray, items: int) -> float:
    """Two-sided: how often a resampled mean is on the other side of 0.

    Never below 2^(1 - items), the chance that all items lean the same way: a few windows that agree
    would else look surer than they can be.
    """
    opposite = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return min(1.0, max(2 * (opposite + 1) / (len(means) + 1), 2.0 ** (1 - items)))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of two or more values."""
    return stdev(values) / math.sqrt(len(values))


def t_interval(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """Student's t interval of the mean of a few draws.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} values have no spread: give at least two")
    half = t_quantile(confidence, len(values) - 1) * standard_error(values)
    mean = fmean(values)
    return Interval(mean, mean - half, mean + half)


def t_within(t: float, freedom: int) -> float:
    """P(|T| < t) of Student's t with a whole ``freedom`` (Abramowitz & Stegun 26.7.3, 26.7.4)."""
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
    """The t with P(|T| < t) = ``confidence``, by bisection."""
    low, high = 0.0, 1.0
    while t_within(high, freedom) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < confidence else (low, middle)
    return high


def wilson(successes: float, items: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a share of 0/1 items (https://doi.org/10.2307/2276774).

    Raises:
        ValueError: no items.
    """
    if items < 1:
        raise ValueError("no items: a share needs at least one")
    z, share = _z(confidence), successes / items
    middle = (share + z * z / (2 * items)) / (1 + z * z / items)
    half = z / (1 + z * z / items)
    half *= math.sqrt(share * (1 - share) / items + z * z / (4 * items * items))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def half_width(values: Sequence[float], limit: int, *, confidence: float = CONFIDENCE) -> float:
    """Half of the interval that a ``limit`` of so many items like these would give the mean.

    Raises:
        ValueError: no values, a single one that is not 0 or 1, or a limit below one.
    """
    if is_binary(values):
        interval = wilson(fmean(values) * limit, limit, confidence=confidence)
        return (interval.high - interval.low) / 2
    return _z(confidence) * stdev(values) / math.sqrt(limit)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of one table, adjusted so that chance marks none of its cells with that probability.

    Holm's step-down method, https://www.jstor.org/stable/4615733.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def spearman(
    a: Sequence[float], b: Sequence[float], *, confidence: float = CONFIDENCE
) -> Interval | None:
    """Rank correlation in [-1, 1] with the interval of Bonett and Wright (items independent).

    https://doi.org/10.1007/BF02294183. None below four items or where one side is constant.
    """
    if len(a) < 4 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    rho = float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])
    centre = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, rho)))
    half = _z(confidence) * math.sqrt((1 + rho * rho / 2) / (len(a) - 3))
    return Interval(rho, math.tanh(centre - half), math.tanh(centre + half))


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1; ties share their mean."""
    data = np.asarray(values, dtype=np.float64)
    below = (data[:, None] > data).sum(1)
    equal = (data[:, None] == data).sum(1)
    return below + (equal + 1) / 2


def is_binary(values: Sequence[float]) -> bool:
    """Whether all are 0 or 1."""
    return all(value in (0, 1) for value in values)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def kendall(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's τ-b in [-1, 1], ties counted; None where one side is constant."""
    first, second = (np.sign(np.subtract.outer(np.asarray(x), np.asarray(x))) for x in (a, b))
    pairs = math.sqrt(float(np.abs(first).sum()) * float(np.abs(second).sum()))
    return float((first * second).sum()) / pairs if pairs else None
