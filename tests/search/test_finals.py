"""The finals: who takes part, who leaves when, who is on the front in the end."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kvsharer_exp.measure.batch_size import BatchSize
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.search.finals import EACH, MARGIN, Batch, Finals, finalists, race, winners
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import TrialResult
from tests.tiny import NUM_LAYERS, room_for, tiny_model

IDENTITY = SharingMap.identity(12)


def result(number: int, loss: float | None, kv: float) -> TrialResult:
    shared = IDENTITY.share(number % 11 + 1, 0)
    status = "screened_out" if loss is None else "complete"
    score = None if loss is None else -loss
    return TrialResult(number, {}, shared, {}, Footprint(1, kv, 0), status, "fit", 0.0, score)


def never() -> bool:
    return False


def batches(means: dict[int, float], spread: float = 0.01, size: int = 8) -> list[Batch]:
    """Of 20 batches; every map has its mean, every window the same share in all maps' losses."""
    dice = random.Random(0)

    def batch(shared: Sequence[float], own: Callable[[], float]) -> Batch:
        return lambda r: [means[r.number] + window + own() for window in shared]

    shared = [[dice.gauss(0, 1) for _ in range(size)] for _ in range(20)]
    return [batch(windows, lambda: dice.gauss(0, spread)) for windows in shared]


class FakeStore:
    """The losses that a study keeps."""

    def __init__(self) -> None:
        self._kept: dict[str, list[float]] = {}

    @property
    def finals(self) -> dict[str, list[float]]:
        return {digest: list(losses) for digest, losses in self._kept.items()}

    def keep_final(self, plan: KVPlan, losses: Sequence[float]) -> None:
        self._kept[plan.digest] = list(losses)


class FakeEvaluator:
    """Its loss on a window is the window's number, plus a little for each layer that reads."""

    def __init__(self, windows: torch.Tensor) -> None:
        self.full_scores = SimpleNamespace(nlls=[0.0] * len(windows))
        self._windows = windows[:, 0].tolist()

    def score(self, fitted: FittedPlan) -> SimpleNamespace:
        more = sum(fitted.plan.key_sources) / 1e4
        return SimpleNamespace(nlls=[number + more for number in self._windows])


def finals_of(size: int, calls: int = 10_000) -> Finals:
    """Finals on 30 windows in batches of ``size``, whose time is over after so many ``calls``."""
    left = itertools.count(calls, -1)
    return Finals(
        lambda: torch.arange(30)[:, None],
        FakeEvaluator,  # type: ignore[arg-type]
        size,
        is_over=lambda: next(left) <= 0,
        say=lambda _: None,
    )


@pytest.mark.parametrize(("before", "after"), [(8, 5), (4, 16), (5, 8)])
def test_finals_that_were_cut_off_go_on_with_batches_of_another_size(before, after) -> None:
    """They compared other windows, or ended in an error at every start."""
    maps = [result(number, 0.1, 0.9) for number in range(3)]
    resumed, anew = FakeStore(), FakeStore()
    finals_of(before, calls=5).hold(resumed, maps, maps[:1])  # type: ignore[arg-type]
    assert 0 < sum(map(len, resumed.finals.values())) < 90
    held = [finals_of(after).hold(store, maps, maps[:1]) for store in (resumed, anew)]  # type: ignore[arg-type]
    assert held[0] == held[1]


def test_a_kill_in_the_finals_loses_the_map_under_way_only(monkeypatch) -> None:
    """It lost every map of the batch under way."""
    maps, resumed, anew = [result(n, 0.1, 0.9) for n in range(4)], FakeStore(), FakeStore()
    whole = finals_of(10).hold(anew, maps, maps[:1])  # type: ignore[arg-type]
    scored: list[KVPlan] = []
    inner = FakeEvaluator.score

    def killed_once(self: FakeEvaluator, fitted: FittedPlan) -> SimpleNamespace:
        scored.append(fitted.plan)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return inner(self, fitted)

    monkeypatch.setattr(FakeEvaluator, "score", killed_once)
    with pytest.raises(KeyboardInterrupt):
        finals_of(10).hold(resumed, maps, maps[:1])  # type: ignore[arg-type]
    assert list(resumed.finals) == [r.plan.digest for r in maps[:2]]
    assert finals_of(10).hold(resumed, maps, maps[:1]) == whole  # type: ignore[arg-type]
    assert scored == [r.plan for r in (*maps[:3], *maps[2:])]


def test_memory_that_runs_out_in_the_finals_makes_batches_smaller_or_costs_one_map() -> None:
    """It ended the sweep."""
    model = tiny_model("llama")
    windows = torch.randint(100, (4, 8), generator=torch.Generator().manual_seed(0))
    full = SharingMap.identity(NUM_LAYERS)
    shared = [full.share(target, 0) for target in (1, 2, 3)]
    maps = [replace(result(n, 0.1, 0.9), plan=KVPlan.of(m)) for n, m in enumerate(shared)]
    said: list[str] = []

    def held(store: FakeStore) -> dict:
        size = BatchSize(4)
        finals = Finals(
            lambda: windows,
            lambda some: Evaluator(model, some, batch_size=size),
            4,
            is_over=never,
            say=said.append,
        )
        return finals.hold(store, maps, maps[:1])[1]  # type: ignore[arg-type]

    whole, small, none = FakeStore(), FakeStore(), FakeStore()
    held(whole)
    with room_for(model, 1):
        held(small)
    for digest, losses in whole.finals.items():
        assert small.finals[digest] == pytest.approx(losses, rel=1e-4, abs=1e-6)
    with room_for(model, 0):
        assert held(none)["windows"] == 0
    left = [line for line in said if "leaves" in line]
    assert left == [
        f"finals: {m} leaves (OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB)"
        for m in shared
    ]


def test_those_close_behind_the_front_take_part() -> None:
    front = [result(0, 0.1, 0.9), result(1, 0.5, 0.8)]
    close = [result(2, 0.1 * (1 + MARGIN) - 1e-9, 0.9), result(3, 0.52, 0.8)]
    others = [result(4, 0.112, 0.9), result(5, None, 0.8), result(6, 0.105, 0.7)]
    assert finalists([*others, *close, *front], front) == [front[0], close[0], front[1], close[1]]
    many = [result(n, 0.5 + n / 1000, 0.8) for n in range(10, 10 + 2 * EACH)]
    assert finalists([*reversed(many), front[1]], front[1:]) == [front[1], *many[: EACH - 1]]


def test_a_front_with_gains_keeps_its_leader() -> None:
    gains = [result(0, -0.2, 0.9), result(1, -0.19, 0.9), result(2, -0.1, 0.9)]
    assert finalists(gains, gains[:1]) == gains[:2]


def test_the_best_of_each_kv_are_left_and_told_apart() -> None:
    maps = [result(n, 0.1, kv) for n, kv in enumerate((0.9, 0.9, 0.9, 0.8, 0.8))]
    means = {0: 0.12, 1: 0.10, 2: 0.2, 3: 0.3, 4: 0.294}
    left = race(maps, batches(means), never)
    assert left.keys() == {1, 4}
    assert 8 < len(left[1]) == len(left[4]) < 160
    assert [r.number for r in winners(maps, left)] == [1, 4]


def test_who_cannot_be_told_apart_stays_to_the_end() -> None:
    maps = [result(n, 0.1, 0.9) for n in range(2)]
    left = race(maps, batches({0: 0.1, 1: 0.1001}, spread=0.1), never)
    assert {number: len(losses) for number, losses in left.items()} == {0: 160, 1: 160}
    assert len(winners(maps, left)) == 1


def test_a_batch_that_not_all_have_had_counts_for_none() -> None:
    maps = [result(n, 0.1, 0.9) for n in range(3)]
    calls = itertools.count()
    left = race(maps, batches({n: 0.1 for n in range(3)}), lambda: next(calls) >= 4)
    assert {len(losses) for losses in left.values()} == {8}
    none = race(maps, batches({n: 0.1 for n in range(3)}), lambda: True)
    assert winners(maps, none) == []


def test_more_kv_leaves_the_front_only_where_less_is_ahead_by_a_standard_error() -> None:
    """Plans with more KV left it for a ten-thousandth of a nat, and budgets had worse plans."""
    maps = [result(0, 0.1, 0.9), result(1, 0.2, 0.8)]
    assert winners(maps, {0: [0.30, 0.29, 0.31], 1: [0.2, 0.2, 0.2]}) == maps[1:]
    assert winners(maps, {0: [0.30, 0.20, 0.28], 1: [0.1, 0.4, 0.1]}) == maps
    assert winners(maps, {0: [0.3], 1: [0.2]}) == maps[1:]


def test_the_searchs_choice_stays_unless_another_is_ahead_by_a_standard_error() -> None:
    maps = [result(0, 0.10, 0.9), result(1, 0.11, 0.9)]
    ahead = {0: [0.30, 0.20, 0.28, 0.22], 1: [0.2, 0.2, 0.2, 0.2]}
    level = {0: [0.30, 0.20, 0.28, 0.22], 1: [0.1, 0.4, 0.1, 0.39]}
    assert winners(maps, ahead) == maps[1:]
    assert winners(maps, level) == maps[:1]


def test_one_window_sends_nobody_home() -> None:
    maps = [result(n, 0.1, 0.9) for n in range(2)]
    means = {0: 0.1, 1: 5.0}
    assert race(maps, batches(means, size=1)[:1], never).keys() == {0, 1}
    assert race(maps, batches(means, size=1), never).keys() == {0}
