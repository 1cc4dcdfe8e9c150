"""The bar of a plan: what the results so far ask of it, whatever the order in which they came."""

import random

import pytest

from kvsharer_exp.search.bars import Bars
from kvsharer_exp.search.front import best_within
from kvsharer_exp.search.outcome import screen
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.trial import TrialResult


def result(number: int, kv: float, score: float | None) -> TrialResult:
    scores = {screen(2): number / 10}
    status = "complete" if score is not None else "screened_out"
    size = Footprint(1, kv, 0)
    return TrialResult(number, {}, KVPlan.full(2), scores, size, status, "fit", 0.0, score)


@pytest.mark.parametrize("seed", range(20))
def test_the_bar_is_the_best_result_that_keeps_no_more(seed: int) -> None:
    dice = random.Random(seed)
    found, bars = [], Bars([2], 0.5)
    for number in range(60):
        score = None if dice.random() < 0.2 else -dice.random()
        found.append(result(number, dice.randrange(1, 9) / 8, score))
        bars.add(found[-1])
        for kv in (0.0, 0.25, 0.3, 1.0):
            best, bar = best_within(found, kv), bars.of(kv)
            if best is None:
                assert bar.score is None and not bar.losses
            else:
                assert bar.score == best.score
                assert bar.losses == {screen(2): best.scores[screen(2)]}
                assert bar.margins == {screen(2): 0.5}


def test_a_plan_is_refused_above_the_margin_and_by_nothing_that_is_not_known() -> None:
    bar = Bars([2, 8], 0.5, [result(4, 0.5, -1.0)]).of(0.5)
    assert bar.refuses(screen(2), 0.6) == ""
    reason = "0.61 on the first 2 windows, the best map with no more KV 0.4 (margin 0.5)"
    assert bar.refuses(screen(2), 0.61) == reason
    assert bar.refuses(screen(8), 9.0) == ""  # the best one has not seen so many windows
