"""The solver against every plan there is, on models small enough to try them all."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from kvsharer_exp.search import solver
from kvsharer_exp.search.solver import (
    GAP,
    solve_all,
    solve_front_with_reads,
    solve_with_reads,
    within,
)
from kvsharer_exp.values.actions.affine import Affine
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.constant import Constant
from kvsharer_exp.values.actions.drop import Drop
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.actions.read import Read
from kvsharer_exp.values.choice import Choice, ReadChoice, Solved
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan, KVPlanError

ACTIONS = (Own(), Own(4), Own(2), Drop(), Affine())
SLACK = 1e-9  # of the loss: HiGHS computes its bound in floating point


def some_choices(seed: int, layers: int, *, ties: bool = False, scale: float = 1) -> list[Choice]:
    """Random losses and bytes; with ``ties`` they are small whole numbers, so many are equal."""
    draw = random.Random(seed)
    choices = []
    for layer in range(layers):
        for action in ACTIONS:
            kept = draw.randint(1, 4) if ties else draw.randint(1, 10_000)
            loss = draw.randint(0, 3) if ties else draw.random()
            owns = isinstance(action, Own)
            choices.append(Choice(layer, action, loss * scale, kept if owns else 0))
    return choices


def some_reads(seed: int, layers: int, *, ties: bool = False, scale: float = 1) -> list[ReadChoice]:
    """Every earlier layer as a source, except that some of its actions are forbidden."""
    draw = random.Random(seed + 1000)

    def loss() -> float:
        return draw.randint(0, 2) if ties else draw.random() / 2

    return [
        ReadChoice(layer, source, {a: loss() * scale for a in ACTIONS[:3] if draw.random() < 0.8})
        for layer in range(layers)
        for source in range(layer)
    ]


def cost(
    actions: Sequence[Action], choices: Sequence[Choice], reads: Sequence[ReadChoice] = ()
) -> tuple[int, float] | None:
    """Bytes and loss of a plan, written out; None where the rules forbid it."""
    table = {(c.layer, c.action): c for c in choices}
    read_losses = {(r.layer, r.source): r.losses for r in reads}
    kept, loss = 0, 0.0
    for layer, action in enumerate(actions):
        if isinstance(action, Read):
            losses = read_losses[layer, action.source]
            if actions[action.source] not in losses:
                return None
            loss += losses[actions[action.source]]
        else:
            kept += table[layer, action].kv_bytes
            loss += table[layer, action].loss
    return (kept, loss) if any(isinstance(action, Own) for action in actions) else None


def every_plan(
    choices: Sequence[Choice], reads: Sequence[ReadChoice] = ()
) -> list[tuple[int, float]]:
    """Bytes and loss of all plans that the rules allow."""
    layers = 1 + max(choice.layer for choice in choices)
    options: list[list[Action]] = [[] for _ in range(layers)]
    for choice in choices:
        options[choice.layer].append(choice.action)
    for read in reads:
        options[read.layer].append(Read(read.source))
    costs = (cost(actions, choices, reads) for actions in itertools.product(*options))
    return [found for found in costs if found is not None]


def lowest(plans: Sequence[tuple[int, float]], budget: int) -> float:
    return min(loss for kept, loss in plans if kept <= budget)


def is_one_line(error: Exception) -> bool:
    return "\n" not in str(error) and len(f"kvsharer: {error}") <= 200


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_front_is_that_of_all_plans(seed: int, ties: bool) -> None:
    choices = some_choices(seed, 6, ties=ties)
    expected: list[tuple[int, float]] = []
    for kept, loss in sorted(every_plan(choices)):
        if not expected or loss < expected[-1][1]:
            expected.append((kept, loss))

    front = solve_all(choices)

    assert [(solved.kv_bytes, solved.loss) for solved in front] == expected
    for solved in front:
        assert cost(solved.plan.actions, choices) == (solved.kv_bytes, solved.loss)


@pytest.mark.parametrize("seed", range(4))
def test_every_budget_gets_the_best_plan(seed: int) -> None:
    choices = some_choices(seed, 6, ties=True)
    plans = every_plan(choices)
    front = solve_all(choices)
    for budget in range(front[0].kv_bytes, 30):
        assert within(front, budget).loss == lowest(plans, budget)
        assert within(front, budget).kv_bytes <= budget


def test_a_step_lists_the_best_plan_of_each_multiple() -> None:
    choices = some_choices(1, 6)
    front, some = solve_all(choices), solve_all(choices, step=5000)
    assert some[0] == front[0]
    assert len(some) < len(front) and set(some) <= set(front)
    multiples = range(5000, 70_000, 5000)
    reached = [budget for budget in multiples if budget >= front[0].kv_bytes]
    assert [within(some, b) for b in reached] == [within(front, b) for b in reached]


def test_a_layer_owns_even_when_dropping_all_costs_nothing() -> None:
    free = [Choice(layer, Drop(), 0.0, 0) for layer in range(3)]
    owned = [Choice(layer, Own(), 1.0 + layer, 10 - layer) for layer in range(3)]
    front = solve_all([*free, *owned])
    assert [str(solved.plan) for solved in front] == ["x_x_2", "x_1_x", "0_x_x"]
    solved, bound = solve_with_reads([*free, *owned], [], 9)
    assert str(solved.plan) == "x_1_x" and bound == pytest.approx(2.0)


def test_an_owner_that_is_beaten_by_a_drop_can_still_be_the_only_owner() -> None:
    choices = [Choice(0, Own(4), 5.0, 7), Choice(0, Drop(), 1.0, 0), Choice(1, Drop(), 0.5, 0)]
    assert solve_all(choices) == [Solved(KVPlan.parse("0q4_x"), 5.5, 7)]


def test_a_layer_with_one_choice_does_that() -> None:
    fixed = [c for c in some_choices(0, 5) if c.layer != 2 or c.action == Drop()]
    assert {solved.plan.actions[2] for solved in solve_all(fixed)} == {Drop()}
    for solved, _ in solve_front_with_reads(fixed, some_reads(0, 2), [10_000, 40_000]):
        assert solved.plan.actions[2] == Drop()


def test_eighty_layers_of_nine_actions_have_a_strict_front() -> None:
    draw = random.Random(7)
    owned = [Own(), Own(8), Own(4), Own(3, 64, 4), Own(2), Own(2, 32, 4)]
    choices = []
    for layer in range(80):
        weight = draw.lognormvariate(0, 1)
        for own in owned:
            sizes = (4099, 0, 3, 64, 2)
            kept = own.precision.key_bytes(*sizes) + own.precision.value_bytes(*sizes)
            loss = weight * 4.0**-own.bits * draw.uniform(0.5, 1.5)
            choices.append(Choice(layer, own, loss, kept))
        for action in (Drop(), Constant(), Affine()):
            choices.append(Choice(layer, action, weight * draw.uniform(0.5, 1.5), 0))

    front = solve_all(choices)

    assert len(front) > 500
    for less, more in itertools.pairwise(front):
        assert less.kv_bytes < more.kv_bytes and less.loss > more.loss
    assert all(solved.plan.num_layers == 80 and solved.plan.owners for solved in front)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("scale", [1, 1e-7, 1e5])
@pytest.mark.parametrize("seed", range(3))
def test_reads_come_within_the_gap_of_all_plans(seed: int, scale: float, ties: bool) -> None:
    choices = some_choices(seed, 5, ties=ties, scale=scale)
    reads = some_reads(seed, 5, ties=ties, scale=scale)
    plans = every_plan(choices, reads)
    smallest, largest = min(plans)[0], sum(c.kv_bytes for c in choices if c.action == Own())
    budgets = [smallest + i * (largest - smallest) // 8 for i in range(9)]

    found = solve_front_with_reads(choices, reads, budgets)

    for budget, (solved, bound) in zip(budgets, found, strict=True):
        optimum = lowest(plans, budget)
        kept, loss = cost(solved.plan.actions, choices, reads) or (None, None)
        assert kept == solved.kv_bytes and loss == pytest.approx(solved.loss)
        assert solved.kv_bytes <= budget
        slack = SLACK * (optimum + scale)
        assert bound - slack <= optimum <= solved.loss + slack
        assert solved.loss <= bound / (1 - GAP) + 1e-6 * scale
    assert any(solved.plan.targets for solved, _ in found)


def test_the_loss_of_a_read_is_that_of_its_sources_bits() -> None:
    choices = [
        Choice(0, Own(), 0.0, 16),
        Choice(0, Own(4), 0.1, 4),
        Choice(1, Own(4), 0.2, 4),
        Choice(1, Drop(), 3.0, 0),
    ]
    bad_from_4_bits = [ReadChoice(1, 0, {Own(): 0.0, Own(4): 1.0})]
    solved, _ = solve_with_reads(choices, bad_from_4_bits, 16)
    assert (str(solved.plan), solved.kv_bytes) == ("0_0", 16)
    solved, _ = solve_with_reads(choices, bad_from_4_bits, 15)
    assert str(solved.plan) == "0q4_1q4"
    solved, _ = solve_with_reads(choices, bad_from_4_bits, 4)
    assert str(solved.plan) == "0q4_0" and solved.loss == pytest.approx(1.1)
    forbidden_from_4_bits = [ReadChoice(1, 0, {Own(): 0.0})]
    solved, _ = solve_with_reads(choices, forbidden_from_4_bits, 4)
    assert str(solved.plan) == "0q4_x"


def test_layers_that_only_own_or_read_make_sharing_maps() -> None:
    choices = [Choice(layer, Own(), 0.0, 10) for layer in range(4)]
    losses = {(1, 0): 4.0, (2, 0): 3.0, (2, 1): 1.0, (3, 0): 5.0, (3, 1): 2.0, (3, 2): 0.5}
    reads = [ReadChoice(*pair, {Own(): loss}) for pair, loss in losses.items()]
    found = solve_front_with_reads(choices, reads, [40, 10, 25])
    assert [str(solved.plan) for solved, _ in found] == ["0_1_2_3", "0_0_0_0", "0_1_1_1"]
    assert [bound for _, bound in found] == pytest.approx([0.0, 12.0, 3.0])
    with pytest.raises(InputError, match="at most 9 bytes: give at least 10"):
        solve_with_reads(choices, reads, 9)


def test_bounds_hold_and_a_plan_comes_back_when_there_is_no_time() -> None:
    choices, reads = some_choices(3, 5), some_reads(3, 5)
    plans, budget = every_plan(choices, reads), 8000
    solved, bound = solve_with_reads(choices, reads, budget, time_limit=0.0)
    assert bound <= lowest(plans, budget) + SLACK
    assert lowest(plans, budget) - SLACK <= solved.loss
    assert solved.loss <= within(solve_all(choices), budget).loss


def test_the_bound_is_below_all_plans_when_a_wide_gap_stops_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(solver, "GAP", 0.2)
    stopped_early = 0
    for seed in range(3):
        choices, reads = some_choices(seed, 5), some_reads(seed, 5)
        plans = every_plan(choices, reads)
        budgets = range(min(plans)[0], 20_000, 1500)
        found = solve_front_with_reads(choices, reads, budgets)
        for budget, (solved, bound) in zip(budgets, found, strict=True):
            optimum = lowest(plans, budget)
            assert bound <= optimum + SLACK
            stopped_early += solved.loss > optimum + SLACK
    assert stopped_early


def test_a_budget_below_the_smallest_plan_is_refused() -> None:
    choices = some_choices(2, 5)
    front = solve_all(choices)
    smallest = front[0].kv_bytes
    with pytest.raises(InputError, match=f"give at least {smallest}$") as caught:
        within(front, smallest - 1)
    assert is_one_line(caught.value)
    with pytest.raises(InputError, match=f"give at least {smallest}$") as caught:
        solve_with_reads(choices, some_reads(2, 5), smallest - 1)
    assert is_one_line(caught.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: solve_all([]), "no layer has a choice that owns"),
        (lambda: solve_all([Choice(0, Drop(), 1.0, 0)]), "no layer has a choice that owns"),
        (lambda: solve_all([Choice(1, Own(), 0.0, 5)]), "layer 0 has no choice"),
        (lambda: solve_all([Choice(0, Own(), 0.0, 5)] * 2), "layer 0 has the choice 0 twice"),
        (lambda: solve_all([Choice(0, Own(), 0.0, 5)], step=0), "step=0: give at least 1"),
        (lambda: Choice(0, Own(), float("nan"), 5), "layer 0 has a choice with loss nan"),
        (lambda: Choice(0, Own(), 0.0, -5), "kv_bytes=-5: give at least 0"),
        (lambda: Choice(3, Read(1), 0.0, 0), "layer 3 reads layer 1: give a ReadChoice"),
        (lambda: ReadChoice(1, 1, {}), "layer 1 reads layer 1: give an earlier layer"),
        (lambda: ReadChoice(1, 0, {Own(): float("inf")}), "layer 1 has a choice with loss inf"),
        (
            lambda: solve_with_reads([Choice(0, Own(), 0, 5)], [ReadChoice(1, 0, {Own(4): 0})], 9),
            "no plan was found: allow",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(make: Callable[[], object], says: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert says in str(caught.value) and is_one_line(caught.value)
    assert not isinstance(caught.value, KVPlanError)
