"""Rank correlations: whether two lists of numbers order the same things alike.

``ablate`` asks this of distances and costs of pairs, and a sweep of its scoring stages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kvsharer_exp.values.finite import check_finite
from kvsharer_exp.values.intervals import CONFIDENCE, Interval, z_quantile


def spearman(
    a: Sequence[float], b: Sequence[float], *, confidence: float = CONFIDENCE
) -> Interval | None:
    """Spearman's rank correlation in [-1, 1], with the interval of Bonett and Wright.

    The interval takes the items to be independent. The result is None for fewer than four items, or
    where one side is constant. https://doi.org/10.1007/BF02294183
    """
    check_finite("ranked values", [*a, *b])
    if len(a) < 4 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    rho = float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])
    centre = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, rho)))
    half = z_quantile(confidence) * math.sqrt((1 + rho * rho / 2) / (len(a) - 3))
    return Interval(rho, math.tanh(centre - half), math.tanh(centre + half))


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Rank ``values`` from 1; equal values share the mean of their ranks."""
    data = np.asarray(values, dtype=np.float64)
    below = (data[:, None] > data).sum(1)
    equal = (data[:, None] == data).sum(1)
    return below + (equal + 1) / 2


def kendall(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's τ-b in [-1, 1], which allows for ties; None where one side is constant."""
    check_finite("ranked values", [*a, *b])
    first, second = (np.sign(np.subtract.outer(np.asarray(x), np.asarray(x))) for x in (a, b))
    pairs = math.sqrt(float(np.abs(first).sum()) * float(np.abs(second).sum()))
    return float((first * second).sum()) / pairs if pairs else None
