"""Read the scores of one map from a ``result.json``, and what it retains of the full cache's.

`result_readers` calls `scores_of` for every map of a run. The shares are calculated anew from the
scores, so that runs of all versions are read by one rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from kvsharer_exp.reporting.ablation import MARKS
from kvsharer_exp.reporting.measured import Measured
from kvsharer_exp.values.score_names import (
    HELD_OUT_KL,
    KL,
    ScoreName,
    higher_is_better,
    retained,
    share_name,
    table_columns,
)


def scores_of(
    base: Measured,
    scores: Mapping[str, float],
    full: Mapping[str, float],
    *,
    intervals: Mapping[str, Mapping[str, float]] | None = None,
    marks: Mapping[str, str] | None = None,
) -> Iterator[Measured]:
    """Yield the scores that a table shows, and the means over the tasks if there are several.

    ``base`` says which map the scores are of. ``intervals`` and ``marks`` are by score name;
    the interval of what is retained stands under its `share_name`.
    """
    told = base.run.result
    shares = retained(scores, full, told.get("directions"), told.get("pass_marks"))
    kept = shares if base.num_shared != 0 else {}
    values, known = [], intervals or {}
    for name in (name for name in (HELD_OUT_KL, *table_columns(full)) if name in scores):
        if name in (KL, HELD_OUT_KL) and base.num_shared == 0:
            continue  # the KL of the full cache to itself is 0 by definition
        inside, share = known.get(name, {}), known.get(share_name(name), {})
        low, high = inside.get("low"), inside.get("high")
        value = replace(
            base,
            quantity=name,
            value=scores[name],
            low=low if low != high else None,
            high=high if low != high else None,
            retained=kept.get(name),
            retained_low=share.get("low"),
            retained_high=share.get("high"),
            mark=MARKS.get((marks or {}).get(name, ""), ""),
        )
        values.append(value)
        yield value
    yield from _task_means(base, values, full)


def _task_means(
    base: Measured, values: Sequence[Measured], full: Mapping[str, float]
) -> Iterator[Measured]:
    """Yield the mean over the tasks as the paper averages: the mean of the scores, from 0 to 100.

    For a map that shares layers, the percentage of the full cache's mean is yielded too, over the
    tasks that the full cache does not fail. There are no means for fewer than two tasks whose score
    is better when higher. Tasks err independently.
    """
    told = base.run.result.get("directions", {})
    tasks = [v for v in values if ScoreName.parse(v.quantity).is_task and v.quantity in full]
    tasks = [value for value in tasks if higher_is_better(value.quantity, told)]
    if len(tasks) < 2:
        return
    halves = [_half(v.low, v.high) for v in tasks]
    mean = 100 * fmean(v.value for v in tasks)
    yield _mean(base, "tasks/mean", mean, tasks, [100 * h / len(tasks) for h in halves])
    kept = [value for value in tasks if value.retained is not None]
    if len(kept) < 2:
        return
    # The mean of the map over that of the full cache weighs each task's share by the full score.
    weights = [100 * full[v.quantity] / sum(full[v.quantity] for v in kept) for v in kept]
    share = sum(w * (v.retained or 0.0) for w, v in zip(weights, kept, strict=True))
    halves = [_half(v.retained_low, v.retained_high) for v in kept]
    halves = [weight * half for weight, half in zip(weights, halves, strict=True)]
    yield _mean(base, "tasks/retained", share, kept, halves)


def _mean(
    base: Measured, quantity: str, mean: float, tasks: Sequence[Measured], halves: Sequence[float]
) -> Measured:
    """A mean over ``tasks``; ``halves`` are what the interval of each adds, NaN: nobody knows."""
    names = sorted(ScoreName.parse(value.quantity).subject for value in tasks)
    half = math.hypot(*halves)
    known = not math.isnan(half)
    return replace(
        base,
        settings={**base.settings, "tasks": names},
        quantity=quantity,
        value=mean,
        low=mean - half if known else None,
        high=mean + half if known else None,
    )


def _half(low: float | None, high: float | None) -> float:
    """Half the width of an interval; NaN if there is none."""
    return math.nan if low is None or high is None else (high - low) / 2
