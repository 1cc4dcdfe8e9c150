"""How sure a difference is: paired comparisons of two maps on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

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


def _bootstrap_p(means: np.ndarray, items: int) -> float:
    """Two-sided: how often a resampled mean is on the other side of 0.

    Never below 2^(1 - items), the chance that all items lean the same way: a few windows that agree
    would else look surer than they can be.
    """
    opposite = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return min(1.0, max(2 * (opposite + 1) / (len(means) + 1), 2.0 ** (1 - items)))


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
