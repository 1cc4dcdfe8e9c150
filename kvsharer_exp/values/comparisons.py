"""Say how sure a difference is: paired comparisons of two maps on the same items.

An ablation compares its arms with the reference arm this way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from kvsharer_exp.values.finite import check_finite
from kvsharer_exp.values.intervals import (
    CONFIDENCE,
    RESAMPLES,
    Interval,
    is_binary,
    quantiles,
    resampled_means,
    standard_error,
    t_interval,
    t_quantile,
    t_within,
    wilson,
    z_quantile,
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The mean of a - b over the same items, with its interval and p-value.

    ``p_value`` is the probability that chance alone makes a difference at least as large. ``test``
    says how it was found: ``mcnemar``, ``bootstrap``, or ``t`` (over draws). ``items`` is the
    number of items, or of draws.
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
    """Compare two maps on the same items.

    The p-value is that of McNemar's exact test if all items are 0 or 1, and else the bootstrap's.
    The interval is the bootstrap's in both cases.

    Raises:
        ValueError: there are no items, or ``a`` and ``b`` differ in length.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    means = resampled_means(differences, resamples, seed)
    low, high = quantiles(means, confidence)
    if is_binary(a) and is_binary(b):
        p_value, test = mcnemar(a, b), "mcnemar"
    else:
        p_value, test = _bootstrap_p(means, len(differences)), "bootstrap"
    return Comparison(fmean(differences), low, high, p_value, len(differences), test)


def compare_draws(
    draws: Sequence[float], reference: float, *, confidence: float = CONFIDENCE
) -> Comparison:
    """Compare the draws of a random arm with one fixed score, by Student's t over the draws.

    Raises:
        ValueError: there are fewer than two draws.
    """
    inside = t_interval([draw - reference for draw in draws], confidence=confidence)
    spread = standard_error(draws)
    if spread:
        p_value = 1 - t_within(abs(inside.mean) / spread, len(draws) - 1)
    else:
        p_value = 0.0 if inside.mean else 1.0
    return Comparison(inside.mean, inside.low, inside.high, p_value, len(draws), "t")


def paired_ratio(
    values: Sequence[float], references: Sequence[float], *, confidence: float = CONFIDENCE
) -> Interval:
    """The mean of ``values`` over that of ``references``, which are of the same items.

    Of items of 0 and 1 the interval is Bonett and Price's, which has a width also where both sides
    agree on every item (https://doi.org/10.1002/sim.2440). Of others it is the delta method's.

    Raises:
        ValueError: there are fewer than two pairs, the two differ in length, or the mean of the
            references is not above 0.
    """
    check_finite("items", [*values, *references])
    pairs = list(zip(values, references, strict=True))
    if len(pairs) < 2 or not fmean(references) > 0:
        raise ValueError("a ratio needs two or more pairs, and references with a mean above 0")
    ratio = fmean(values) / fmean(references)
    if is_binary(values) and is_binary(references):
        return Interval(ratio, *_bonett_price(pairs, z_quantile(confidence)))
    error = standard_error([x - ratio * y for x, y in pairs]) / fmean(references)
    half = t_quantile(confidence, len(pairs) - 1) * error
    return Interval(ratio, ratio - half, ratio + half)


def _bonett_price(pairs: Sequence[tuple[float, float]], z: float) -> tuple[float, float]:
    """The ends of the interval of a ratio of two shares of the same items of 0 and 1.

    Each share has Wilson's interval among the items that are 1 on a side, with a z so much smaller
    that the quotient of their ends covers the ratio as often as ``z`` says.
    """
    first, second = sum(x for x, _ in pairs), sum(y for _, y in pairs)
    either = sum(x or y for x, y in pairs)
    discordant = sum(x != y for x, y in pairs)

    def spread(count: float) -> float:
        return math.sqrt((1 - (count + 1) / (either + 2)) / (count + 1))

    together = math.sqrt((discordant + 2) / ((first + 1) * (second + 1)))
    narrowed = math.erf(z * together / (spread(first) + spread(second)) / math.sqrt(2))
    over, under = (wilson(n, int(either), confidence=narrowed) for n in (first, second))
    return over.low / under.high, over.high / under.low


def mcnemar(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided exact p-value: are as many items right in ``a`` only as in ``b`` only?

    By chance, each item that only one of them has right is in ``a`` with probability 1/2, so their
    number is binomial. https://doi.org/10.1007/BF02295996
    """
    check_finite("items", [*a, *b])
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    discordant = only_a + only_b
    tail = sum(math.comb(discordant, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def _bootstrap_p(means: np.ndarray, items: int) -> float:
    """Two-sided p-value: how often a resampled mean lies on the other side of 0.

    The p-value is at least 2^(1 - items), the chance that all items lean the same way. Without this
    floor, a few windows that agree would look surer than they can be.
    """
    opposite = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return min(1.0, max(2 * (opposite + 1) / (len(means) + 1), 2.0 ** (1 - items)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of one table for the number of its cells.

    If every cell with an adjusted p-value below a level is marked, chance alone marks any cell with
    at most that probability. Holm's step-down method, https://www.jstor.org/stable/4615733.
    """
    check_finite("p-values", p_values)
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
