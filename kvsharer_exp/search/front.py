"""Which map beats which: the Pareto front of memory against accuracy, and the best of each size.

A map beats another when it keeps no more KV and scores higher. Everything that has to know this
asks here: the stages that screen maps out, the finals, the memory of our samplers, and what is
written about a sweep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np

from kvsharer_exp.values.trial import TrialResult

Item = TypeVar("Item")
Rung = Callable[[TrialResult], float]
"""Gives a number to a result; of results of the same number, the best is kept."""
RUNGS = 64
"""Plans compete within steps of a 64th of the full cache's bytes."""
Point = tuple[float, float]
"""(kv_fraction, score): less of the first and more of the second is better."""


class Rungs:
    """The steps of bytes within which plans compete: 64ths of the full cache's, cut at budgets.

    Where a budget lies within a step, what keeps no more than it does not compete with what does.

    Args:
        budgets: shares of the full cache's bytes.

    Attributes:
        ends: the share that each rung holds at most, ascending; rung 0 holds nothing.
    """

    def __init__(self, budgets: Iterable[float] = ()) -> None:
        self.ends = np.array(sorted({*(i / RUNGS for i in range(RUNGS + 1)), *budgets}))

    def __call__(self, result: TrialResult) -> int:
        return int(self.of(kv_of(result)))

    def of(self, kv_fraction: Any) -> Any:
        """The rung of a share of the bytes, or of each in an array."""
        return np.searchsorted(self.ends, kv_fraction - 1e-9)


def undominated(
    items: Iterable[Item], *, kv: Callable[[Item], float], score: Callable[[Item], float]
) -> list[Item]:
    """The ``items`` that no other item beats, least KV first; of equal items the first stays."""
    front: list[Item] = []
    for item in sorted(items, key=lambda item: (kv(item), -score(item))):
        if not front or score(item) > score(front[-1]):
            front.append(item)
    return front


def pareto_front(results: Iterable[TrialResult]) -> list[TrialResult]:
    """The complete results that no other beats, fewest shared layers first.

    Of results with equal kv_fraction and score the earliest stays.
    """
    ranked = sorted(filter(is_comparable, results), key=lambda result: result.number)
    return undominated(ranked, kv=kv_of, score=score_of)[::-1]


def best_within(results: Iterable[TrialResult], kv_fraction: float) -> TrialResult | None:
    """The best scored result with at most ``kv_fraction`` of the KV; None if there is none."""
    fitting = [r for r in results if is_comparable(r) and kv_of(r) <= kv_fraction]
    return max(fitting, key=score_of, default=None)


def is_beaten(result: TrialResult, results: Iterable[TrialResult]) -> bool:
    """Whether one of ``results`` keeps no more KV than ``result`` and scores higher."""
    best = best_within(results, kv_of(result))
    return best is not None and score_of(best) > score_of(result)


def num_shared(result: TrialResult) -> int:
    """The rung of maps: how many layers read another one."""
    return result.num_shared


bytes_rung = Rungs()
"""The rung of plans where no budget is known: the 64ths of the bytes, rounded up."""


def by_rung(
    results: Iterable[TrialResult], rung: Callable[[TrialResult], int] = num_shared
) -> dict[int, list[TrialResult]]:
    """The complete results by ``rung``, which ascends; the best come first."""
    ranked = sorted(filter(is_comparable, results), key=lambda r: (-score_of(r), r.number))
    found: dict[int, list[TrialResult]] = {step: [] for step in sorted({rung(r) for r in ranked})}
    for result in ranked:
        found[rung(result)].append(result)
    return found


def best_per_rung(
    results: Iterable[TrialResult], rung: Callable[[TrialResult], int] = num_shared
) -> dict[int, TrialResult]:
    """The best complete result of each ``rung``, by ascending rung."""
    return {step: ranked[0] for step, ranked in by_rung(results, rung).items()}


class BestSoFar:
    """The best complete result of each rung, as results come in."""

    def __init__(
        self,
        results: Iterable[TrialResult] = (),
        rung: Callable[[TrialResult], int] = num_shared,
    ) -> None:
        self.rung = rung
        self.best = best_per_rung(results, rung)

    def add(self, result: TrialResult) -> bool:
        """Take in ``result``; returns whether it is the best of its rung so far."""
        step = self.rung(result)
        before = self.best.get(step)
        if not is_comparable(result) or (before and score_of(result) <= score_of(before)):
            return False
        self.best[step] = result
        return True


def hypervolume(points: Iterable[Point], reference: Point) -> float:
    """The area between the front of ``points`` and ``reference``, in units of kv_fraction × score.

    Points that do not beat the reference in both do not count. Zitzler and Thiele, 1999.
    """
    far, floor = reference
    counted = [p for p in points if p[0] < far and p[1] > floor and math.isfinite(sum(p))]
    front = undominated(counted, kv=itemgetter(0), score=itemgetter(1))
    ends = [*[fraction for fraction, _ in front[1:]], far]
    area = 0.0
    for (fraction, score), end in zip(front, ends, strict=False):
        area += (end - fraction) * (score - floor)
    return area


class GrowingFront:
    """The front of results added one by one, and its hypervolume after each."""

    def __init__(self, results: Iterable[TrialResult], reference: Point) -> None:
        self._reference = reference
        self._front: list[TrialResult] = []
        self.volumes: list[float] = []
        for result in results:
            self.add(result)

    def add(self, result: TrialResult) -> float:
        """Take in ``result``; returns the hypervolume. A result without a score changes nothing."""
        front = pareto_front([*self._front, result])
        if front != self._front or not self.volumes:
            self._front = front
            self.volumes.append(hypervolume(points_of(front), self._reference))
        else:
            self.volumes.append(self.volumes[-1])
        return self.volumes[-1]

    def is_flat(self, patience: int, tolerance: float = 1e-3) -> bool:
        """Whether the last ``patience`` results added less than ``tolerance`` of the volume."""
        if len(self.volumes) <= patience:
            return False
        return self.volumes[-1] <= (1 + tolerance) * self.volumes[-1 - patience]


def points_of(results: Sequence[TrialResult]) -> list[Point]:
    """The points (kv_fraction, score) of ``results``, which all have a score."""
    return [(kv_of(result), score_of(result)) for result in results]


def kv_of(result: TrialResult) -> float:
    """The share of the full cache's KV that the map keeps."""
    return result.footprint.kv_fraction


def is_comparable(result: TrialResult) -> bool:
    """Whether the result is complete and can be compared: NaN is neither better nor
    worse than anything, and no map has an infinite score."""
    return result.status == "complete" and result.score is not None and math.isfinite(result.score)


def score_of(result: TrialResult) -> float:
    """The score of a complete result."""
    assert result.score is not None
    return result.score
