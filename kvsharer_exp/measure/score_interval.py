"""Give the scores of one map, and what it retains, intervals over the items behind them.

`HeldOutScorer` and the rows of an ablation call `score_intervals`. Whoever says what a map retains
of the full cache's scores calls `share_intervals`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean

from kvsharer_exp.values.comparisons import paired_ratio
from kvsharer_exp.values.intervals import Interval, bootstrap, is_binary, t_interval, wilson
from kvsharer_exp.values.score_names import (
    Directions,
    ScoreName,
    bounds,
    higher_is_better,
    share_name,
)

Items = Mapping[str, Sequence[float]]
"""By score name, the values behind a score in the order of the items."""


def score_intervals(
    scores: Mapping[str, float],
    items: Items,
    errors: Mapping[str, float],
    *,
    confidence: float,
    seed: int = 0,
) -> dict[str, Interval]:
    """The interval of each of ``scores`` that has one, by score name (see `score_interval`).

    ``items``: the values behind each score. ``errors``: the standard errors of scores that have a
    formula for it. ``confidence``: that of the intervals. ``seed``: that of the bootstrap.
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

    The interval of a perplexity is the bootstrap's over its log-likelihoods. A score of a task that
    is the mean of items of 0 and 1 has Wilson's interval. For other scores the standard error
    ``stderr`` gives the interval, or the bootstrap if there is none. The result is None for a score
    that has no standard error and is not the mean of its items.
    """
    parts = ScoreName.parse(name)
    if parts.kind == "perplexity":
        inside = bootstrap(items, confidence=confidence, seed=seed)
        return Interval(value, math.exp(-inside.high), math.exp(-inside.low))
    is_mean = bool(items) and math.isclose(fmean(items), value, abs_tol=1e-9)
    if is_mean and parts.is_task and is_binary(items):  # a KL may be 0 in every window too
        return wilson(sum(items), len(items), confidence=confidence)
    if stderr is not None:
        half = NormalDist().inv_cdf((1 + confidence) / 2) * stderr
        # No perplexity is below 0, and the formula of a few items may say so.
        return Interval(value, value - half, value + half).within(*bounds(name))
    if is_mean:
        return bootstrap(items, confidence=confidence, seed=seed)
    return None


def share_intervals(
    shares: Mapping[str, float],
    items: Items,
    full_items: Items,
    directions: Directions | None = None,
    *,
    confidence: float,
) -> dict[str, Interval]:
    """The interval of each of the retained ``shares`` that has one, by `share_name`.

    It is paired: ``items`` of the map and ``full_items`` of the full cache are the same ones, so
    what both find hard does not widen it. A share that its items do not give, like that of F1, has
    none.
    """
    found = {}
    for name, share in shares.items():
        ours, theirs = items.get(name, ()), full_items.get(name, ())
        if len(ours) < 2 or len(ours) != len(theirs):
            continue
        if ScoreName.parse(name).of_likelihoods:
            gains = [a - b for a, b in zip(ours, theirs, strict=True)]
            logs = t_interval(gains, confidence=confidence)
            inside = Interval(*map(math.exp, (logs.mean, logs.low, logs.high)))
        else:
            up = higher_is_better(name, directions)
            over, under = (ours, theirs) if up else (theirs, ours)
            if not fmean(under) > 0:
                continue
            inside = paired_ratio(over, under, confidence=confidence)
            if up:  # no share is above that of a perfect score
                inside = inside.within(*(bound / fmean(theirs) for bound in bounds(name)))
        if math.isclose(inside.mean, share, rel_tol=1e-6):
            found[share_name(name)] = inside
    return found
