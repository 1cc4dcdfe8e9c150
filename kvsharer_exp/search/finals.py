"""The finals: maps that a search cannot tell apart, on windows it never used, until one leads.

A race (Maron and Moore, *Hoeffding Races*, NeurIPS 1993): batch after batch of windows goes to all
maps that are left, and who is behind the best map of its KV beyond doubt leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from statistics import fmean

from kvsharer_exp.values.intervals import standard_error, t_interval
from kvsharer_exp.values.trial import TrialResult

Batch = Callable[[TrialResult], Sequence[float]]
"""The losses of a map on the windows of one batch."""

Losses = Mapping[int, Sequence[float]]
"""By number of the trial, the losses of its map on the windows so far."""

# How far behind the best of its KV a map may be, as a part of that one's loss, and how many may.
MARGIN, EACH = 0.1, 6
_CERTAIN = 0.95


def finalists(results: Sequence[TrialResult], front: Sequence[TrialResult]) -> list[TrialResult]:
    """The maps of ``front``, each followed by those with as much KV that are close behind."""
    found = []
    for leader in front:
        best = leader.score or 0.0
        rivals = [
            result
            for result in results
            if _kv(result) == _kv(leader)
            and result.score is not None
            and result.score >= best - MARGIN * abs(best)
        ]
        rivals.sort(key=lambda result: (-(result.score or 0.0), result.number))
        found += rivals[:EACH]
    return found


def race(
    maps: Sequence[TrialResult], batches: Iterable[Batch], is_over: Callable[[], bool]
) -> Losses:
    """Losses of the maps that are left when there is one of every KV, when the ``batches`` are
    out, or when it ``is_over``. A batch that not all have had counts for none."""
    left: Losses = {result.number: () for result in maps}
    by_number = {result.number: result for result in maps}
    for batch in batches:
        if len(left) == len({_kv(by_number[number]) for number in left}):
            break
        more: dict[int, Sequence[float]] = {}
        for number, losses in left.items():
            if is_over():
                return left
            more[number] = (*losses, *batch(by_number[number]))
        left = _in_doubt(more, by_number)
    return left


def winners(maps: Sequence[TrialResult], losses: Losses) -> list[TrialResult]:
    """The front by mean loss, most KV first: the winner of every KV that beats those with less.

    The first of ``maps`` with that KV which is left wins, unless the one of least loss is ahead of
    it by more than a standard error: a few windows say less than the search did.
    """
    left = sorted((result for result in maps if losses.get(result.number)), key=_kv)
    front: list[TrialResult] = []
    for _, group in groupby(left, key=_kv):
        rivals = list(group)
        best = min(rivals, key=lambda result: fmean(losses[result.number]))
        ahead = _difference(losses[rivals[0].number], losses[best.number])
        if fmean(ahead) <= (standard_error(ahead) if len(ahead) > 1 else 0.0):
            best = rivals[0]
        if not front or fmean(losses[best.number]) < fmean(losses[front[-1].number]):
            front.append(best)
    return front[::-1]


def _in_doubt(losses: Losses, maps: Mapping[int, TrialResult]) -> Losses:
    """Of those who may yet be the best of their KV; all, while one window is all there is."""
    kept: dict[int, Sequence[float]] = {}
    ranked = sorted(losses, key=lambda number: (_kv(maps[number]), fmean(losses[number])))
    for _, group in groupby(ranked, key=lambda number: _kv(maps[number])):
        leader, *rivals = group
        kept[leader] = losses[leader]
        for number in rivals:
            behind = _difference(losses[number], losses[leader])
            if len(behind) < 2 or t_interval(behind, confidence=_CERTAIN).low <= 0:
                kept[number] = losses[number]
    return kept


def _difference(some: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(some, others, strict=True)]


def _kv(result: TrialResult) -> float:
    return result.footprint.kv_fraction
