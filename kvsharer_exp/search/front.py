"""The Pareto front of memory against accuracy, and its hypervolume."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from kvsharer_exp.values.trial import TrialResult

Point = tuple[float, float]
"""(kv_fraction, score): less of the first and more of the second is better."""


def pareto_front(results: Iterable[TrialResult]) -> list[TrialResult]:
    """Complete results that no other beats in both; fewest shared layers first.

    Of results with equal kv_fraction and score the earliest stays.
    """
    ranked = sorted(
        (result for result in results if _comparable(result)),
        key=lambda result: (result.footprint.kv_fraction, -_score(result), result.number),
    )
    front: list[TrialResult] = []
    for result in ranked:  # least KV first: each must beat the score of those before it
        if not front or _score(result) > _score(front[-1]):
            front.append(result)
    return front[::-1]


def _comparable(result: TrialResult) -> bool:
    """Complete, with a score that can be compared: NaN is neither better nor worse."""
    return result.status == "complete" and result.score is not None and not math.isnan(result.score)


def _score(result: TrialResult) -> float:
    assert result.score is not None
    return result.score


def hypervolume(points: Iterable[Point], reference: Point) -> float:
    """Area between the front of ``points`` and ``reference``, in units of kv_fraction × score.

    Points that do not beat the reference in both count nothing. Source: Zitzler and Thiele 1999.
    """
    far, floor = reference
    area, best = 0.0, floor
    previous = None
    for fraction, score in sorted(points, key=lambda p: (p[0], -p[1])):
        if fraction >= far or score <= best:
            continue
        if previous is not None:
            area += (fraction - previous) * (best - floor)
        previous, best = fraction, score
    return area if previous is None else area + (far - previous) * (best - floor)


class GrowingFront:
    """The front of results added one by one, and its hypervolume after each."""

    def __init__(self, results: Iterable[TrialResult], reference: Point) -> None:
        self._reference = reference
        self._front: list[TrialResult] = []
        self.volumes: list[float] = []
        for result in results:
            self.add(result)

    def add(self, result: TrialResult) -> float:
        """The hypervolume with ``result``; one without a score changes nothing."""
        front = pareto_front([*self._front, result])
        if front != self._front or not self.volumes:
            self._front = front
            points = [(r.footprint.kv_fraction, _score(r)) for r in front]
            self.volumes.append(hypervolume(points, self._reference))
        else:
            self.volumes.append(self.volumes[-1])
        return self.volumes[-1]

    def is_flat(self, patience: int, tolerance: float = 1e-3) -> bool:
        """Whether the last ``patience`` results added less than ``tolerance`` of the volume."""
        if len(self.volumes) <= patience:
            return False
        return self.volumes[-1] <= (1 + tolerance) * self.volumes[-1 - patience]


def best_per_size(results: Iterable[TrialResult]) -> dict[int, TrialResult]:
    """The best complete result for each number of shared layers, by ascending number."""
    best: dict[int, TrialResult] = {}
    ranked = sorted(filter(_comparable, results), key=lambda r: (-_score(r), r.number))
    for result in ranked:
        best.setdefault(len(result.sharing_map.targets), result)
    return dict(sorted(best.items()))


def best_rival(result: TrialResult, results: Sequence[TrialResult]) -> float:
    """The best score of a map with no more KV; its own where none is better."""
    assert result.score is not None
    size = result.footprint.kv_fraction
    scored = [r.score for r in results if r.score is not None and r.footprint.kv_fraction <= size]
    return max([*scored, result.score])
