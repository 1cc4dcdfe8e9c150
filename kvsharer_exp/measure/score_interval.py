"""The interval of one map's score over the items behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean

from kvsharer_exp.values.intervals import (
    Interval,
    bootstrap,
    is_binary,
    wilson,
)


def score_interval(
    name: str,
    value: float,
    items: Sequence[float],
    *,
    confidence: float,
    stderr: float | None = None,
    seed: int = 0,
) -> Interval | None:
    """Of one map's score over its items: Wilson's for 0/1 items, from the standard error where
    there is one, else the bootstrap's; None for a score that is no mean of its items."""
    if name.startswith("perplexity/"):
        inside = bootstrap(items, confidence=confidence, seed=seed)
        return Interval(value, math.exp(-inside.high), math.exp(-inside.low))
    if items and is_binary(items) and math.isclose(fmean(items), value, abs_tol=1e-9):
        return wilson(sum(items), len(items), confidence=confidence)
    if stderr is not None:
        half = NormalDist().inv_cdf((1 + confidence) / 2) * stderr
        return Interval(value, value - half, value + half)
    if items and math.isclose(fmean(items), value, abs_tol=1e-9):
        return bootstrap(items, confidence=confidence, seed=seed)
    return None
