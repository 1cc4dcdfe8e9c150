"""Intervals and tests against values worked out by hand, from tables, or by counting all cases."""

import math
import random
from itertools import product
from statistics import NormalDist, fmean, stdev

import pytest

from kvsharer_exp.values.comparisons import (
    compare,
    compare_draws,
    holm,
    mcnemar,
    paired_ratio,
)
from kvsharer_exp.values.correlation import kendall, spearman
from kvsharer_exp.values.intervals import (
    bootstrap,
    half_width,
    t_interval,
    t_quantile,
    t_within,
    wilson,
)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p_value"),
    [
        (6, 1, 2 * (1 + 7) / 2**7),  # at most 1 of 7 heads, twice
        (5, 0, 2 / 2**5),
        (0, 3, 2 / 2**3),
        (2, 2, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_counts_discordant_items_only(only_a: int, only_b: int, p_value: float) -> None:
    a = [1.0] * only_a + [0.0] * only_b + [1.0, 0.0, 1.0]
    b = [0.0] * only_a + [1.0] * only_b + [1.0, 0.0, 1.0]
    assert mcnemar(a, b) == pytest.approx(p_value)


def test_mcnemar_of_thousands_of_items_is_near_the_normal_one() -> None:
    a = [1.0] * 1050 + [0.0] * 950
    b = [0.0] * 1050 + [1.0] * 950
    z = (100 - 1) / math.sqrt(2000)  # continuity corrected
    assert mcnemar(a, b) == pytest.approx(2 * (1 - NormalDist().cdf(z)), rel=1e-3)


def test_the_bootstrap_of_three_values_is_that_of_all_27_resamples() -> None:
    values = [0.0, 1.0, 5.0]
    means = sorted(fmean(draw) for draw in product(values, repeat=3))
    interval = bootstrap(values, confidence=0.5, resamples=40_000)
    assert interval.mean == 2.0
    # The quartiles of the 27 equally likely means, and none of these sits on a step's edge.
    assert interval.low == pytest.approx(means[int(0.25 * 27)])
    assert interval.high == pytest.approx(means[int(0.75 * 27)])


def test_the_bootstrap_of_many_values_is_near_the_normal_interval() -> None:
    values = [math.sin(7 * i) for i in range(500)]
    interval = bootstrap(values)
    half = 1.96 * stdev(values) / math.sqrt(500)
    assert interval.low == pytest.approx(fmean(values) - half, abs=0.1 * half)
    assert interval.high == pytest.approx(fmean(values) + half, abs=0.1 * half)


def test_the_bootstrap_is_seeded_and_the_same_in_chunks(monkeypatch) -> None:
    from kvsharer_exp.values import intervals

    values = [math.exp(math.sin(i)) for i in range(30)]
    whole = bootstrap(values, seed=3)
    assert whole == bootstrap(values, seed=3) != bootstrap(values, seed=4)
    monkeypatch.setattr(intervals, "_CHUNK", 64)
    assert bootstrap(values, seed=3) == whole


def test_pairs_see_what_means_do_not() -> None:
    """A steady difference far below the spread of the items is real when they are paired."""
    b = [float(i) for i in range(20)]
    a = [value + 0.1 + 0.01 * (-1) ** i for i, value in enumerate(b)]
    found = compare(a, b)
    assert found.test == "bootstrap"
    assert found.difference == pytest.approx(0.1)
    assert 0.09 < found.low < 0.1 < found.high < 0.11
    assert found.p_value < 0.001
    assert compare(a, b[::-1]).p_value > 0.5


def test_equal_maps_are_not_told_apart() -> None:
    for items in ([0.2, 0.4, 0.9], [1.0, 0.0, 1.0]):
        found = compare(items, items)
        assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_few_items_that_agree_are_no_proof() -> None:
    assert compare([1.5, 2.5, 3.5], [1.0, 2.0, 3.0]).p_value == 2.0**-2


def test_zero_one_items_are_compared_by_mcnemar() -> None:
    a, b = [1.0] * 7 + [0.0], [0.0] * 6 + [1.0, 1.0]
    found = compare(a, b)
    assert (found.test, found.items) == ("mcnemar", 8)
    assert found.p_value == mcnemar(a, b) == 0.125
    assert found.difference == pytest.approx(5 / 8)


def test_items_must_pair_and_exist() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compare([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


# P(|T| < t) = confidence, from printed tables.
T_TABLE = [
    (1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (4, 0.95, 2.776), (5, 0.99, 4.032),
    (9, 0.95, 2.262), (10, 0.9, 1.812), (30, 0.95, 2.042), (120, 0.95, 1.980),
]  # fmt: skip


@pytest.mark.parametrize(("freedom", "confidence", "t"), T_TABLE)
def test_students_t_as_in_the_tables(freedom: int, confidence: float, t: float) -> None:
    assert t_quantile(confidence, freedom) == pytest.approx(t, abs=5e-4)
    assert t_within(t, freedom) == pytest.approx(confidence, abs=1e-4)


def test_interval_over_draws() -> None:
    interval = t_interval([2.0, 4.0, 9.0])
    half = 4.303 * stdev([2.0, 4.0, 9.0]) / math.sqrt(3)
    assert interval.mean == 5.0
    assert interval.high - interval.mean == pytest.approx(half, rel=1e-3)
    with pytest.raises(ValueError, match="at least two"):
        t_interval([1.0])


def test_draws_against_a_fixed_score() -> None:
    found = compare_draws([2.0, 4.0, 9.0], 1.0)
    t = 4.0 / (stdev([2.0, 4.0, 9.0]) / math.sqrt(3))
    assert found.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t))  # closed form for 2
    assert compare_draws([3.0, 3.0], 3.0).p_value == 1.0
    assert compare_draws([3.0, 3.0], 2.0).p_value == 0.0


def test_wilson_as_worked_out_by_hand() -> None:
    # p = .8, n = 10, z = 1.96: (.8 + .19207) / 1.38415 ± 1.41603 x sqrt(.016 + .0096037)
    interval = wilson(8, 10)
    assert (interval.low, interval.high) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert (wilson(0, 10).low, wilson(10, 10).high) == pytest.approx((0, 1), abs=1e-12)
    assert wilson(0, 10).high == pytest.approx(1.96**2 / (10 + 1.96**2), abs=1e-3)


def test_a_limit_four_times_as_high_halves_the_interval() -> None:
    answers = [1.0, 0.0] * 50
    assert half_width(answers, 400) == pytest.approx(0.049, abs=5e-4)
    assert half_width(answers, 100) == pytest.approx(2 * half_width(answers, 400), rel=0.02)
    losses = [1.0, 2.0, 3.0]
    assert half_width(losses, 16) == pytest.approx(1.96 / 4, rel=1e-4)


def test_holm_as_worked_out_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_spearman_is_of_ranks() -> None:
    found = spearman([1, 2, 3, 4, 5], [1, 8, 27, 64, 125])
    assert found is not None
    assert found.mean == pytest.approx(1.0)
    # 1 - 6 x (sum of squared rank differences 2 + 2) / (5 x 24)
    found = spearman([1, 2, 3, 4, 5], [2, 1, 3, 5, 4])
    assert found is not None
    assert found.mean == pytest.approx(0.8)
    assert found.low < 0.8 < found.high
    tied = spearman([1, 2, 2, 3], [10, 20, 20, 30])
    assert tied is not None
    assert tied.mean == pytest.approx(1.0)
    assert spearman([1, 1, 1, 1], [1, 2, 3, 4]) is None


def test_kendalls_tau_by_hand() -> None:
    assert kendall([1, 2, 3, 4], [1, 2, 3, 4]) == 1
    assert kendall([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert kendall([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)  # five pairs agree, one not
    # τ-b: one tie on one side, so 5 comparable pairs there against 6.
    assert kendall([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(5 * 6))
    assert kendall([1, 1, 1], [1, 2, 3]) is None


@pytest.mark.parametrize(
    ("items", "both", "first_only", "second_only"),
    [(24, 0.6, 0.1, 0.1), (24, 0.3, 0.02, 0.3), (100, 0.85, 0.01, 0.05)],
)
def test_a_ratio_of_shares_of_the_same_items_lies_in_its_interval_as_often_as_it_says(
    items: int, both: float, first_only: float, second_only: float
) -> None:
    draw, true = random.Random(0), (both + first_only) / (both + second_only)
    pairs = [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]
    chances = [both, first_only, second_only, 1 - both - first_only - second_only]
    held = 0
    for _ in range(500):
        a, b = zip(*draw.choices(pairs, chances, k=items), strict=True)
        inside = paired_ratio(a, b)
        held += inside.low <= true <= inside.high
    assert 0.93 <= held / 500 <= 0.995


def test_sides_that_agree_on_every_item_have_an_interval_too() -> None:
    inside = paired_ratio([1.0, 0.0] * 12, [1.0, 0.0] * 12)
    assert inside.low < inside.mean == 1.0 < inside.high
    more = paired_ratio([1.0, 0.0] * 120, [1.0, 0.0] * 120)
    assert inside.low < more.low and more.high < inside.high


def test_a_ratio_of_other_values_has_the_interval_of_the_delta_method() -> None:
    a, b = [1.0, 2.0, 4.0, 3.5], [2.0, 2.5, 4.0, 5.0]
    inside = paired_ratio(a, b)
    ratio = fmean(a) / fmean(b)
    error = stdev([x - ratio * y for x, y in zip(a, b, strict=True)]) / 2 / fmean(b)
    assert inside.mean == ratio
    assert inside.high - ratio == pytest.approx(t_quantile(0.95, 3) * error)
    assert inside.mean - inside.low == pytest.approx(inside.high - inside.mean)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0]), ([1.0, 1.0], [0.0, 0.0])])
def test_a_ratio_of_nothing_is_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="two or more pairs"):
        paired_ratio(a, b)
