"""The best KV plan for any budget of bytes, when the losses of the layers add up.

A search measures what every action costs at every layer (`Choice`, `ReadChoice`) and asks here for
plans. A layer that may do only one thing is given that one choice.

Without reads this is a multiple-choice knapsack, and `solve_all` solves it for all budgets at once:
it goes through the layers and keeps the partial plans that no other one beats. With reads, what a
layer costs depends on its source, and `solve_with_reads` gives an integer program to HiGHS, which
returns a plan and a bound that none beats. Kellerer et al., Knapsack Problems, 2004, chapter 11.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import coo_array

from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.read import Read
from kvsharer_exp.values.choice import Choice, ReadChoice, Solved
from kvsharer_exp.values.errors import InputError, at_least
from kvsharer_exp.values.plan import KVPlan

GAP = 0.005
"""The integer program stops when its plan is at most this share above the bound."""


@dataclass(frozen=True, slots=True)
class Options:
    """What one layer may do without another; the arrays, (actions,), are int64, float64, bool."""

    actions: Sequence[Action]
    kept: np.ndarray
    losses: np.ndarray
    owns: np.ndarray


Found = tuple[tuple[Action, ...], float, int]  # the actions of a plan, its loss, its bytes
Steps = Callable[[np.ndarray], np.ndarray]  # the step that holds each of these numbers of bytes


def solve_all(choices: Sequence[Choice], *, step: int = 1) -> list[Solved]:
    """The plans without reads that no other one beats: bytes ascend, losses descend strictly.

    With a ``step`` above 1 only the smallest plan and the best ones within 1, 2, 3, … times
    ``step`` bytes are listed. Each is exact; there are fewer of them to build and to store.

    Raises:
        InputError: a layer has no choice, an action is given twice at a layer, or none owns.
    """
    at_least("step", step, 1)
    layers = [
        Options(
            [choice.action for choice in of_layer],
            np.array([choice.kv_bytes for choice in of_layer], np.int64),
            np.array([choice.loss for choice in of_layer], float),
            np.array([choice.owns for choice in of_layer], bool),
        )
        for of_layer in _by_layer(choices)
    ]
    found = solve_options(layers, lambda kept: -(-kept // step))
    return [Solved(KVPlan(actions), loss, kept) for actions, loss, kept in found]


def solve_options(layers: Sequence[Options], steps: Steps, budget: float = math.inf) -> list[Found]:
    """Do as `solve_all` with the `Options` of each layer, within a ``budget`` of bytes.

    Raises:
        InputError: a layer has no options.
    """
    for layer, options in enumerate(layers):
        if not len(options.actions):
            raise InputError(f"layer {layer} has no choice without a read: give one")
    # Layers with one option come first, in one step: no state of theirs beats another.
    fixed = [options for options in layers if len(options.actions) == 1]
    open_ = [options for options in layers if len(options.actions) > 1]
    kept = np.array([sum(int(options.kept[0]) for options in fixed)])
    losses = np.array([sum(float(options.losses[0]) for options in fixed)])
    owns = np.array([any(options.owns[0] for options in fixed)])
    left = budget - sum(int(options.kept.min()) for options in open_)  # whatever these layers do
    chain: list[tuple[np.ndarray, np.ndarray]] = []  # of each state: the one before, the choice
    for options in open_:
        states = len(kept)
        kept = np.add.outer(options.kept, kept).ravel()
        losses = np.add.outer(options.losses, losses).ravel()
        owns = np.logical_or.outer(options.owns, owns).ravel()
        left += int(options.kept.min())
        some = np.flatnonzero(kept <= left)
        some = some[_unbeaten(kept[some], losses[some], owns[some])]
        chain.append((some % states, some // states))
        kept, losses, owns = kept[some], losses[some], owns[some]
    ends = np.flatnonzero(owns & (kept <= left))
    numbers = steps(kept[ends])
    listed = np.append(numbers[1:] != numbers[:-1], True)[: len(ends)]
    listed[:1] = True
    ends = ends[listed]
    made = iter(_walk_back(open_, chain, ends))
    columns = [
        [options.actions[0]] * len(ends) if len(options.actions) == 1 else next(made)
        for options in layers
    ]
    return list(
        zip(zip(*columns, strict=True), losses[ends].tolist(), kept[ends].tolist(), strict=True)
    )


def _unbeaten(kept: np.ndarray, losses: np.ndarray, owns: np.ndarray) -> np.ndarray:
    """The states that no other one beats, by bytes. One without an owner beats none that has."""
    if owns.all():
        order = np.lexsort((losses, kept))
        return order[_falls(losses[order])]
    order = np.lexsort((~owns, losses, kept))
    has, loss = owns[order], losses[order]
    return order[np.where(has, _falls(np.where(has, loss, np.inf)), _falls(loss))]


def _falls(values: np.ndarray) -> np.ndarray:
    """Where a value is finite and below each one before it."""
    return values < np.append(np.inf, np.minimum.accumulate(values)[:-1])


def _walk_back(
    layers: Sequence[Options], chain: list[tuple[np.ndarray, np.ndarray]], ends: np.ndarray
) -> list[list[Action]]:
    """For each layer the actions that led to each of the states ``ends``."""
    columns: list[list[Action]] = []
    for options, (before, chosen) in zip(reversed(layers), reversed(chain), strict=True):
        columns.append([options.actions[i] for i in chosen[ends]])
        ends = before[ends]
    return columns[::-1]


def within(front: Sequence[Solved], budget: int) -> Solved:
    """The best plan of a ``front`` (ascending in bytes) that keeps at most ``budget`` bytes.

    Raises:
        InputError: the smallest plan keeps more.
    """
    place = bisect_right(front, budget, key=lambda solved: solved.kv_bytes)
    if place == 0:
        raise _too_small(budget, front[0].kv_bytes)
    return front[place - 1]


def solve_with_reads(
    choices: Sequence[Choice], reads: Sequence[ReadChoice], budget: int, *, time_limit: float = 5.0
) -> tuple[Solved, float]:
    """The best plan found within ``budget`` bytes, and a loss that no plan can go below.

    The gap between the two is at most `GAP` of the loss, unless ``time_limit`` seconds pass first.

    Raises:
        InputError: see `solve_front_with_reads`.
    """
    return solve_front_with_reads(choices, reads, [budget], time_limit=time_limit)[0]


def solve_front_with_reads(
    choices: Sequence[Choice],
    reads: Sequence[ReadChoice],
    budgets: Sequence[int],
    *,
    time_limit: float = 5.0,
) -> list[tuple[Solved, float]]:
    """What `solve_with_reads` returns, for each of ``budgets``; the time limit is for each.

    A plan that fits a smaller budget also counts for the larger ones.

    Raises:
        InputError: a layer has nothing to do or an action twice, no layer may own, a budget is
            smaller than the smallest plan, or no plan was found in time.
    """
    program = _Program(_by_layer(choices, reads), reads)
    found: dict[int, tuple[Solved, float]] = {}
    best: Solved | None = None
    for budget in sorted(set(budgets)):
        solved, bound, finished = program.solve(budget, time_limit)
        others = [] if finished else _without_reads(choices, budget)
        candidates = [plan for plan in (best, solved, *others) if plan is not None]
        if not candidates:
            raise InputError(
                f"no plan was found in {time_limit:g} seconds: give more time or bytes"
            )
        best = min(candidates, key=lambda plan: plan.loss)
        found[budget] = best, min(bound, best.loss)
    return [found[budget] for budget in budgets]


class _Program:
    """The integer program of one set of choices and reads.

    Each choice has a variable, 1 when its layer makes that choice. Each read and action of its
    source has another, which is at most that of the source's choice. Only the first are declared
    whole numbers: once they are set, the best reads are known.
    """

    def __init__(self, layers: list[list[Choice]], reads: Sequence[ReadChoice]) -> None:
        self.choices = choices = [choice for options in layers for choice in options]
        owners = {(c.layer, c.action): i for i, c in enumerate(choices) if c.owns}
        free = [min((c.loss for c in own if c.kv_bytes == 0), default=math.inf) for own in layers]
        self.reads = [
            (read, loss, owners[read.source, action])
            for read in reads
            for action, loss in read.losses.items()
            if (read.source, action) in owners and loss < free[read.layer]
        ]
        self.unit = math.gcd(*(choice.kv_bytes for choice in choices)) or 1
        first, count, columns = len(choices), len(self.reads), len(choices) + len(self.reads)
        self.losses = np.array([c.loss for c in choices] + [loss for _, loss, _ in self.reads])
        self.units = np.zeros(columns)
        self.units[:first] = [choice.kv_bytes // self.unit for choice in choices]
        self.whole = np.arange(columns) < first
        places = [c.layer for c in choices] + [read.layer for read, _, _ in self.reads]
        one_each = coo_array((np.ones(columns), (places, range(columns))), (len(layers), columns))
        owning = np.isin(range(columns), list(owners.values()))
        self.rules = [LinearConstraint(one_each.tocsc(), 1, 1), LinearConstraint(owning[None], 1)]
        if self.reads:
            rows, sources = range(count), [column for _, _, column in self.reads]
            links = coo_array((np.ones(count), (rows, range(first, columns))), (count, columns))
            links -= coo_array((np.ones(count), (rows, sources)), (count, columns))
            self.rules.append(LinearConstraint(links, -np.inf, 0))

    def solve(self, budget: int, time_limit: float) -> tuple[Solved | None, float, bool]:
        """The plan if one was found, the bound, and whether the gap was closed in time."""
        rules = [*self.rules, LinearConstraint(self.units[None], -np.inf, budget // self.unit)]
        scale = np.abs(self.losses).max() or 1.0
        relaxed = self._minimise(self.losses / scale, rules, 0 * self.whole)
        if relaxed.x is None:
            raise self._refusal(budget, time_limit)
        bound = relaxed.fun * scale
        scale = max(abs(bound), 1e-6 * scale)  # HiGHS also stops at an absolute gap of 1e-6
        options = {"mip_rel_gap": GAP, "time_limit": time_limit}
        result = self._minimise(self.losses / scale, rules, self.whole, options)
        if result.x is None and result.status != 1:  # not for want of time
            raise self._refusal(budget, time_limit)
        if result.mip_dual_bound is not None:
            bound = max(bound, result.mip_dual_bound * scale)
        solved = None if result.x is None else self._plan(result.x)
        if solved is None or solved.kv_bytes > budget:  # the tolerance of HiGHS let it through
            return None, float(bound), False
        return solved, float(bound), result.status == 0

    def _refusal(self, budget: int, time_limit: float) -> InputError:
        """Names the smallest plan; if that takes too long, the smallest one that was found."""
        options = {"mip_rel_gap": 0, "time_limit": time_limit}
        least = self._minimise(self.units, self.rules, self.whole, options)
        if least.x is None:
            return InputError("no plan was found: allow own for the layers that others must read")
        return _too_small(budget, self._plan(least.x).kv_bytes)

    def _minimise(self, costs: np.ndarray, rules: list, whole: np.ndarray, options=None) -> Any:
        return milp(costs, integrality=whole, bounds=(0, 1), constraints=rules, options=options)

    def _plan(self, values: np.ndarray) -> Solved:
        """The plan of the choices that are made; other layers read the best source there is."""
        made = {self.choices[i].layer: i for i in np.flatnonzero(values[self.whole] > 0.5)}
        best: dict[int, tuple[float, int, Action]] = {}
        for choice in map(self.choices.__getitem__, made.values()):
            best[choice.layer] = choice.loss, choice.kv_bytes, choice.action
        for read, loss, column in sorted(self.reads, key=lambda item: item[1]):
            if read.layer not in best and made.get(read.source) == column:
                best[read.layer] = loss, 0, Read(read.source)
        losses, kept, actions = zip(*(best[layer] for layer in sorted(best)), strict=True)
        return Solved(KVPlan(actions), float(sum(losses)), sum(kept))


def _by_layer(choices: Sequence[Choice], reads: Sequence[ReadChoice] = ()) -> list[list[Choice]]:
    """The choices of each layer, after a check that each layer has one or can read."""
    last = max([c.layer for c in choices] + [read.layer for read in reads], default=-1)
    layers: list[list[Choice]] = [[] for _ in range(last + 1)]
    for choice in choices:
        if any(choice.action == other.action for other in layers[choice.layer]):
            text = choice.action.text(choice.layer)
            raise InputError(f"layer {choice.layer} has the choice {text} twice: give it once")
        layers[choice.layer].append(choice)
    readers = {read.layer for read in reads}
    for layer, options in enumerate(layers):
        if not options and layer not in readers:
            raise InputError(f"layer {layer} has no choice: give at least one")
    if not any(choice.owns for choice in choices):
        raise InputError("no layer has a choice that owns its KV: give one, as every plan needs it")
    return layers


def _without_reads(choices: Sequence[Choice], budget: int) -> list[Solved]:
    """The best plan without reads within ``budget``, if there is one."""
    try:
        return [within(solve_all(choices, step=max(budget, 1)), budget)]
    except InputError:
        return []


def _too_small(budget: int, smallest: int) -> InputError:
    return InputError(f"no plan keeps at most {budget} bytes: give at least {smallest}")
