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
    is_binary,
    quantiles,
    resampled_means,
    standard_error,
    t_interval,
    t_within,
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
