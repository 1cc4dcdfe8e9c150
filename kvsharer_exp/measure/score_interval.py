"""Intervals of one map's scores over the items behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean

from kvsharer_exp.values.intervals import Interval, bootstrap, is_binary, wilson
from kvsharer_exp.values.score_names import ScoreName


def score_intervals(
    scores: Mapping[str, float],
    items: Mapping[str, Sequence[float]],
    errors: Mapping[str, float],
    *,
    confidence: float,
    seed: int = 0,
) -> dict[str, Interval]:
    """By score name the interval of each of ``scores`` that has one, see `score_interval`.

    ``items``: the values behind each score. ``errors``: standard errors, where there is a formula.
    """
    found = {
        name: score_interval(
            name,
            value,
            items.get(name, []),
            confidence=confidence,
            stderr=errors.get(name),
            seed=seed,
        )
        for name, value in scores.items()
    }
    return {name: interval for name, interval in found.items() if interval is not None}


def score_interval(
    name: str,
    value: float,
    items: Sequence[float],
    *,
    confidence: float,
    stderr: float | None = None,
    seed: int = 0,
) -> Interval | None:
    """The interval of one score over its ``items``.

    A score that is the mean of 0/1 items has Wilson's interval. Otherwise the standard error makes
    the interval where there is one, and the bootstrap where there is none. A score that is not the
    mean of its items and has no standard error has no interval: None.
    """
    if ScoreName.parse(name).kind == "perplexity":
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
