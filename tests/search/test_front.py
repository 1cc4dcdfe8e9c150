"""The front and its hypervolume against brute force."""

import itertools
import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kvsharer_exp.search.front import (
    BestSoFar,
    GrowingFront,
    best_per_rung,
    best_within,
    by_rung,
    hypervolume,
    is_beaten,
    pareto_front,
)
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import TrialResult

grid = st.integers(0, 6)
points = st.lists(st.tuples(grid, grid), max_size=12)


def result(number: int, fraction: float, score: float | None, shared: int = 0) -> TrialResult:
    sharing_map = SharingMap((0,) * (shared + 1))
    status = "failed" if score is None else "complete"
    return TrialResult(
        number, {}, sharing_map, {}, Footprint(1, fraction, 0), status, "", 0.0, score
    )


@given(points)
def test_front_is_what_nothing_beats(chosen: list[tuple[int, int]]) -> None:
    results = [result(i, x, y) for i, (x, y) in enumerate(chosen)]
    front = {(r.footprint.kv_fraction, r.score) for r in pareto_front(results)}
    brute = {
        (x, y)
        for x, y in chosen
        if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in chosen)
    }
    assert front == brute


@given(points)
def test_front_is_sorted_and_keeps_the_earliest_of_equals(chosen) -> None:
    results = [result(i, x, y) for i, (x, y) in enumerate(chosen)]
    front = pareto_front(reversed(results))
    fractions = [r.footprint.kv_fraction for r in front]
    assert fractions == sorted(fractions, reverse=True)
    assert len(set(fractions)) == len(fractions)
    for member in front:
        assert member.number == chosen.index((member.footprint.kv_fraction, member.score))


@given(points)
def test_hypervolume_counts_the_cells_that_are_dominated(chosen) -> None:
    reference = (5, 1)
    cells = sum(
        any(x <= column and y > row for x, y in chosen)
        for column, row in itertools.product(range(5), range(1, 6))
    )
    assert hypervolume(chosen, reference) == cells


def test_points_beyond_the_reference_count_nothing() -> None:
    assert hypervolume([(1.0, 5.0), (0.5, 0.0), (2.0, 9.0)], (1.0, 0.0)) == 0
    assert hypervolume([], (1.0, 0.0)) == 0


def test_only_complete_results_count() -> None:
    results = [result(0, 0.5, None), result(1, 0.6, 0.1, 2), result(2, 0.6, 0.3, 2)]
    assert [r.number for r in pareto_front(results)] == [2]
    assert {size: r.number for size, r in best_per_rung(results).items()} == {2: 2}


def test_a_status_that_is_not_complete_and_a_score_that_is_no_number_stay_out() -> None:
    screened = replace(result(0, 0.1, 5.0), status="screened_out")
    results = [screened, result(1, 0.2, float("nan")), result(2, 0.6, 0.3)]
    assert [r.number for r in pareto_front(results)] == [2]
    assert [r.number for r in best_per_rung(results).values()] == [2]


@given(points)
def test_the_front_does_not_depend_on_the_order_and_has_the_whole_hypervolume(chosen) -> None:
    results = [result(i, x, y, shared=x) for i, (x, y) in enumerate(chosen)]
    front = pareto_front(results)
    assert pareto_front(results[::-1]) == front
    assert best_per_rung(results[::-1]) == best_per_rung(results)
    reduced = [(r.footprint.kv_fraction, r.score) for r in front]
    assert hypervolume(reduced, (5, 1)) == hypervolume(chosen, (5, 1))


@given(points)
def test_hypervolumes_are_those_of_every_beginning(chosen) -> None:
    results = [result(i, x, y if y else None) for i, (x, y) in enumerate(chosen)]
    scored = [[(r.footprint.kv_fraction, r.score) for r in results[:i] if r.score is not None]
              for i in range(1, len(results) + 1)]  # fmt: skip
    assert GrowingFront(results, (5, 1)).volumes == [
        hypervolume(points, (5, 1)) for points in scored
    ]


def test_of_equal_maps_of_one_size_the_earliest_is_best() -> None:
    results = [result(3, 0.5, 1.0, 2), result(1, 0.5, 1.0, 2), result(2, 0.9, 0.5, 1)]
    assert {size: r.number for size, r in best_per_rung(results).items()} == {1: 2, 2: 1}
    assert list(best_per_rung(results)) == [1, 2]


def test_a_front_is_flat_when_the_last_results_added_next_to_nothing() -> None:
    front = GrowingFront([], (1.0, -2.0))
    for number, score in enumerate((-1.0, -0.5, -0.4999, -0.4999)):
        front.add(result(number, 0.5, score))
    assert front.is_flat(2) and not front.is_flat(3)
    assert not front.is_flat(4)  # not so many yet


@given(points)
def test_a_result_is_beaten_by_a_better_one_of_no_more_kv(chosen: list[tuple[int, int]]) -> None:
    results = [result(i, x, y) for i, (x, y) in enumerate(chosen)]
    for one, (x, y) in zip(results, chosen, strict=True):
        assert is_beaten(one, results) == any(a <= x and b > y for a, b in chosen)
        best = best_within(results, x)
        assert best is not None
        assert best.score == max(b for a, b in chosen if a <= x)
    assert best_within(results, -1) is None


@given(points)
def test_the_best_so_far_are_the_best_of_what_came(chosen: list[tuple[int, int]]) -> None:
    results = [result(i, x, y, shared=x) for i, (x, y) in enumerate(chosen)]
    seen = BestSoFar()
    for count, one in enumerate(results, start=1):
        before = seen.best.get(one.num_shared)
        assert seen.add(one) == (before is None or one.score > before.score)
        assert seen.best == best_per_rung(results[:count])
    for size, ranked in by_rung(results).items():
        assert [r.score for r in ranked] == sorted((r.score for r in ranked), reverse=True)
        assert {r.num_shared for r in ranked} == {size}


def test_what_has_no_score_beats_nothing() -> None:
    results = [result(0, 0.5, 1.0), result(1, 0.2, None), result(2, 0.1, math.nan)]
    assert pareto_front(results) == results[:1]
    assert not BestSoFar(results[:1]).add(results[2])
