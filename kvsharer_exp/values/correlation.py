"""Rank correlations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kvsharer_exp.values.intervals import CONFIDENCE, Interval, z_quantile


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
    half = z_quantile(confidence) * math.sqrt((1 + rho * rho / 2) / (len(a) - 3))
    return Interval(rho, math.tanh(centre - half), math.tanh(centre + half))


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1; ties share their mean."""
    data = np.asarray(values, dtype=np.float64)
    below = (data[:, None] > data).sum(1)
    equal = (data[:, None] == data).sum(1)
    return below + (equal + 1) / 2


def kendall(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's τ-b in [-1, 1], ties counted; None where one side is constant."""
    first, second = (np.sign(np.subtract.outer(np.asarray(x), np.asarray(x))) for x in (a, b))
    pairs = math.sqrt(float(np.abs(first).sum()) * float(np.abs(second).sum()))
    return float((first * second).sum()) / pairs if pairs else None
