"""Read the scores of one map from a ``result.json``, and what it retains of the full cache's.

`result_readers` calls `scores_of` for every map of a run. The shares are calculated anew from the
scores, so that runs of all versions are read by one rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

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
    each = [(v, v.value, v.low, v.high) for v in tasks]
    yield _mean(base, "tasks/mean", each, [100 / len(tasks)] * len(tasks))
    kept = [value for value in tasks if value.retained is not None]
    if len(kept) < 2:
        return
    # The mean of the map over that of the full cache weighs each task's share by the full score.
    weights = [100 * full[v.quantity] / sum(full[v.quantity] for v in kept) for v in kept]
    each = [(v, v.retained or 0.0, v.retained_low, v.retained_high) for v in kept]
    yield _mean(base, "tasks/retained", each, weights)


def _mean(
    base: Measured,
    quantity: str,
    each: Sequence[tuple[Measured, float, float | None, float | None]],
    weights: Sequence[float],
) -> Measured:
    """The sum of ``weights`` × values; ``each`` task has its value and the ends of its interval.

    The way from the sum to an end is the root of the squared ways of the tasks to that end. So the
    interval stays within the bounds of the tasks' own (https://doi.org/10.1002/sim.3095). It is not
    known if that of a task is not.
    """
    names = sorted(ScoreName.parse(value.quantity).subject for value, *_ in each)
    mean = sum(weight * value for weight, (_, value, _, _) in zip(weights, each, strict=True))
    below, above = [], []
    for weight, (_, value, low, high) in zip(weights, each, strict=True):
        if low is not None and high is not None:
            below.append(weight * (value - low))
            above.append(weight * (high - value))
    known = len(below) == len(each)
    return replace(
        base,
        settings={**base.settings, "tasks": names},
        quantity=quantity,
        value=mean,
        low=mean - math.hypot(*below) if known else None,
        high=mean + math.hypot(*above) if known else None,
    )
