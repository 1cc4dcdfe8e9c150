"""Agreement of two runtimes item by item, and ratios with intervals."""

import math

import pytest

from kvsharer_exp.values.agreement import agreement
from kvsharer_exp.values.intervals import ratio_interval, t_interval


def test_choices_are_compared_item_by_item() -> None:
    one = [[(-1.0, False), (-2.0, False)], [(-3.0, False), (-1.0, False)]]
    other = [[(-1.5, False), (-1.25, False)], [(-3.0, False), (-1.0, False)]]
    found = agreement(one, other, scores=[1, 0], other_scores=[0, 1])
    assert (found.items, found.texts) == (2, 4)
    assert found.same_choice == 1  # the first item: another text is the likeliest
    assert found.same_score == 0  # though both are right once
    assert found.largest_difference == 0.75


def test_a_single_text_is_greedy_or_not() -> None:
    one = [[(-1.0, True)], [(-2.0, False)], [(-3.0, True)]]
    other = [[(-1.0, True)], [(-2.0, True)], [(-2.5, True)]]
    found = agreement(one, other, scores=[1, 0, 1], other_scores=[1, 1, 1])
    assert (found.same_choice, found.same_score, found.largest_difference) == (2, 2, 0.5)


def test_a_text_that_is_only_weighed_has_no_choice_and_no_right_answer() -> None:
    found = agreement([[(-10.0, None)]], [[(-10.25, None)]], scores=[-1.5], other_scores=[-1.625])
    assert (found.same_choice, found.same_score, found.largest_difference) == (None, None, 0.25)


def test_other_items_or_texts_are_no_comparison() -> None:
    item = [(-1.0, True)]
    for one, other in (([item], [item, item]), ([item], [[*item, *item]]), ([], [])):
        with pytest.raises(ValueError):
            agreement(one, other, scores=[1] * len(one), other_scores=[1] * len(other))


def test_a_ratio_is_that_of_pairs() -> None:
    """A machine that is twice as slow in the second round leaves the ratio as it is."""
    found = ratio_interval([11.0, 5.5, 12.1], [10.0, 5.0, 11.0])
    assert found.mean == pytest.approx(1.1)
    assert found.low == pytest.approx(1.1) and found.high == pytest.approx(1.1)


def test_the_interval_of_a_ratio_is_students_of_the_logarithms() -> None:
    values, references = [2.0, 3.0, 8.0], [1.0, 2.0, 2.0]
    found, inverse = ratio_interval(values, references), ratio_interval(references, values)
    assert found.mean == pytest.approx(12 ** (1 / 3))
    logs = t_interval([math.log(2), math.log(1.5), math.log(4)])
    assert (found.low, found.high) == pytest.approx((math.exp(logs.low), math.exp(logs.high)))
    assert (inverse.low, inverse.high) == pytest.approx((1 / found.high, 1 / found.low))
    with pytest.raises(ValueError):
        ratio_interval([1.0], [1.0])
