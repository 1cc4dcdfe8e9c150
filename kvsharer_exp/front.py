"""The Pareto front of memory against accuracy, and its hypervolume."""

from __future__ import annotations

from collections.abc import Iterable

from kvsharer_exp.records import TrialResult

Point = tuple[float, float]
"""(kv_fraction, score): less of the first and more of the second is better."""


def pareto_front(results: Iterable[TrialResult]) -> list[TrialResult]:
    """Complete results that no other beats in both; fewest shared layers first.

    Of results with equal kv_fraction and score the earliest stays.
    """
    complete = [result for result in results if result.score is not None]
    complete.sort(key=lambda r: (r.footprint.kv_fraction, -(r.score or 0.0), r.number))
    front: list[TrialResult] = []
    for result in complete:  # least KV first: each must beat the score of those before it
        if not front or (result.score or 0.0) > (front[-1].score or 0.0):
            front.append(result)
    return front[::-1]


def hypervolume(points: Iterable[Point], reference: Point) -> float:
    """Area between the front of ``points`` and ``reference``, (kv_fraction, score) units.

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


def best_per_size(results: Iterable[TrialResult]) -> dict[int, TrialResult]:
    """The best complete result for each number of shared layers, by ascending number."""
    best: dict[int, TrialResult] = {}
    for result in results:
        size = len(result.sharing_map.targets)
        if result.score is not None and (
            size not in best or result.score > (best[size].score or 0.0)
        ):
            best[size] = result
    return dict(sorted(best.items()))
