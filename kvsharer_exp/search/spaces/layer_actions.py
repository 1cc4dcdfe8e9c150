"""The search space ``layer_actions``: what each layer does about its KV, out of a few candidates.

It holds KV plans. It is the default; `registry.make_space` makes it for
``search_space=layer_actions``. The candidates come with the setting: `cli.steps.plan_candidates`
makes them from the options.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution

from kvsharer_exp.search.candidates import (
    HALVES,
    READ,
    Candidate,
    fixed_layers,
    full_bytes,
    priced,
    wanted_actions,
)
from kvsharer_exp.search.front import Rungs
from kvsharer_exp.search.solver import Options, solve_front_with_reads, solve_options
from kvsharer_exp.search.spaces.base import Space
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.errors import InputError, at_least
from kvsharer_exp.values.plan import KVPlan, KVPlanError

ACTIONS = (
    *("own", "q4g128s4", "q3g128s4", "q3s4", "q2g64s4", "q2s4"),
    *("x", "c", "a", "read"),
)


@dataclass(frozen=True)
class LayerActions(Space):
    """``action_L`` is the text of what layer L does; what cannot be is repaired.

    A layer that reads one which keeps nothing keeps its own KV instead, in 16 bits, and so does the
    first layer if none would.

    Args:
        actions: what the search may choose from: ``own``, bits with sinks and group like ``q3s4``,
            ``x`` (drop), ``c`` (constant), ``a`` (affine), ``read``, and beside it ``halves``: keys
            of one such source and values of another.
        sources: how many sources each layer may read, those of least block error, >= 0.
        fixed: by layer, the one action that it does.
    """

    actions: Sequence[str] = ACTIONS
    sources: int = 3
    fixed: Mapping[int, str] = field(default_factory=dict)
    holds_plans: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least("search_space.options.sources", self.sources, 0)
        if isinstance(self.actions, str) or not self.actions:
            raise InputError(
                f"search_space.options.actions={self.actions}: give a list like [own,q4,a]"
            )
        if HALVES in self.actions and READ not in self.actions:
            raise InputError("search_space.options.actions has halves without read: give both")
        fixed = fixed_layers(self.fixed)
        for layer in (0, *fixed):
            wanted_actions(layer, self.actions, fixed)

    @cached_property
    def at(self) -> tuple[tuple[Candidate, ...], ...]:
        """The candidates of each layer."""
        layers: list[list[Candidate]] = [[] for _ in range(self.ranking.num_layers)]
        for candidate in self.setting.candidates:
            layers[candidate.layer].append(candidate)
        return tuple(map(tuple, layers))

    @cached_property
    def full_bytes(self) -> int:
        """The bytes of the full cache."""
        return full_bytes(self.setting.candidates)

    @cached_property
    def steps(self) -> Rungs:
        """The rungs, which the budgets cut."""
        return Rungs(self.setting.budgets)

    @cached_property
    def rungs(self) -> tuple[int, int]:
        """The lowest and highest rung that is searched: what the budgets hold, and a bit above."""
        budgets = self.setting.budgets or (1.0,)
        above = min(1.0, max(budgets) + 1 / 16)
        return int(self.steps.of(min(budgets))), int(self.steps.of(above))

    def distributions(self) -> dict[str, BaseDistribution]:
        return {
            f"action_{layer}": CategoricalDistribution([c.action.text(layer) for c in of_layer])
            for layer, of_layer in enumerate(self.at)
        }

    def decode(self, params: Mapping[str, Any]) -> KVPlan:
        return repaired(
            [named[params[f"action_{layer}"]] for layer, named in enumerate(self._by_text)]
        )

    @cached_property
    def _by_text(self) -> tuple[dict[str, Action], ...]:
        return tuple({c.action.text(c.layer): c.action for c in of_layer} for of_layer in self.at)

    def encode(self, plan: KVPlan) -> dict[str, Any] | None:
        if plan.num_layers != len(self.at) or any(
            text not in [c.action.text(layer) for c in self.at[layer]]
            for layer, text in enumerate(plan.texts)
        ):
            return None
        return {f"action_{layer}": text for layer, text in enumerate(plan.texts)}

    def kv_bytes(self, plan: KVPlan) -> int:
        """The bytes that ``plan`` keeps; its actions are candidates, or keep nothing or 16 bits."""
        return sum(self._bytes[layer].get(action, 0) for layer, action in enumerate(plan.actions))

    @cached_property
    def _bytes(self) -> tuple[dict[Action, int], ...]:
        return tuple(
            {Own(): of[0].full_bytes} | {c.action: c.kv_bytes for c in of} for of in self.at
        )

    def rung(self, plan: KVPlan) -> int:
        """The rung that holds the bytes of ``plan``."""
        return self.rung_of(self.kv_bytes(plan))

    def rung_of(self, kv_bytes: int) -> int:
        """The rung that holds so many bytes."""
        return int(self.steps.of(kv_bytes / self.full_bytes))

    def budget(self, rung: int) -> int:
        """The bytes that a plan of ``rung`` may keep."""
        return math.floor(self.steps.ends[rung] * self.full_bytes * (1 + 1e-12))

    @cached_property
    def places(self) -> tuple[dict[Action, int], ...]:
        """By layer, the place of each action among those that are `alone`."""
        return tuple({a: i for i, a in enumerate(actions)} for actions, _, _ in self.alone)

    @cached_property
    def alone(self) -> tuple[tuple[list[Action], np.ndarray, np.ndarray], ...]:
        """By layer the candidates that need no other: actions, their bytes, and which own."""
        found = []
        for layer, of_layer in enumerate(self.at):
            alone = [c for c in of_layer if _is_alone(c)]
            owns = [
                c.action.keys_from(layer) == c.action.values_from(layer) == layer for c in alone
            ]
            kv_bytes = np.array([c.kv_bytes for c in alone], np.int64)
            found.append(([c.action for c in alone], kv_bytes, np.array(owns, bool)))
        return tuple(found)

    @cached_property
    def reads(self) -> tuple[tuple[Action, ...], ...]:
        """By layer the candidates that read other ones."""
        return tuple(tuple(c.action for c in of if not _is_alone(c)) for of in self.at)

    def seeds(self) -> SolvedSeeds:
        """The best plans, with reads, at the budgets asked for and between, of these block errors.

        The losses of the layers are taken to be their block errors, and to add up.
        """
        low, high = self.rungs
        between = {round(low + (high - low) * i / 8) for i in range(9)}
        asked = {int(self.steps.of(budget)) for budget in self.setting.budgets}
        budgets = sorted(self.budget(r) for r in between | asked)
        errors = {(c.layer, c.action): c.error for of in self.at for c in of}
        found = solve_front_with_reads(*priced(self.setting.candidates, errors), budgets)
        return SolvedSeeds(
            tuple(dict.fromkeys(solved.plan for solved, _ in found)),
            max(solved.gap(bound) for solved, bound in found),
        )


class Priced:
    """A `LayerActions` whose actions have ``costs``, by layer and action, that add up.

    Plans are exact without reads. In each, every layer that keeps nothing then reads the owner that
    costs less than what it does, if there is one.
    """

    def __init__(self, space: LayerActions, costs: Mapping[tuple[int, Action], float]) -> None:
        self._space, self._costs = space, costs
        self._layers = [
            Options(actions, kv_bytes, np.array([costs[layer, a] for a in actions]), owns)
            for layer, (actions, kv_bytes, owns) in enumerate(space.alone)
        ]

    def solve(self, rungs: tuple[int, int] | None = None) -> dict[int, KVPlan]:
        """By rung, the plan of least total cost, where it is better than that of every lower rung.

        With ``rungs``, the lowest and the highest, only these are made.
        """
        low, budget = (rungs[0], self._space.budget(rungs[1])) if rungs else (0, math.inf)
        full = self._space.full_bytes
        found = solve_options(self._layers, lambda kept: self._space.steps.of(kept / full), budget)
        return {
            rung: self._with_reads(actions)
            for actions, _, kv_bytes in found
            if (rung := self._space.rung_of(kv_bytes)) >= low
        }

    def solve_within(self, rung: int, kept: Mapping[int, Action]) -> KVPlan | None:
        """The best plan up to ``rung``; layers in ``kept`` do what they do there.

        Raises:
            InputError: what is kept at a layer is no candidate.
        """
        layers = list(self._layers)
        for layer, action in kept.items():
            place = self._space.places[layer].get(action)
            of = slice(0, 0) if place is None else slice(place, place + 1)
            every = layers[layer]
            layers[layer] = Options(
                every.actions[of], every.kept[of], every.losses[of], every.owns[of]
            )
        budget = self._space.budget(rung)
        found = solve_options(layers, np.zeros_like, budget)
        return self._with_reads(found[-1][0]) if found else None

    def _with_reads(self, alone: tuple[Action, ...]) -> KVPlan:
        actions, costs = list(alone), self._costs
        for layer, action in enumerate(alone):
            if action.keys_from(layer) is not None:
                continue
            for read in self._space.reads[layer]:
                both = read.keys_from(layer), read.values_from(layer)
                sources = [source for source in both if source is not None]
                if any(actions[source].keys_from(source) != source for source in sources):
                    continue
                quantised = costs.get((layer, actions[sources[0]]), 0.0)
                if costs[layer, read] + quantised < costs[layer, actions[layer]]:
                    actions[layer] = read
        return KVPlan(tuple(actions))


@dataclass(frozen=True)
class SolvedSeeds:
    """Solved plans, and how far the worst of them may be above the best possible, as a share."""

    plans: tuple[KVPlan, ...]
    gap: float


def repaired(actions: Sequence[Action]) -> KVPlan:
    """The plan of ``actions``, in which a layer that reads what is not kept keeps its own KV."""
    mended = list(actions)
    for layer, action in enumerate(mended):
        sources = action.keys_from(layer), action.values_from(layer)
        if any(
            s not in (None, layer) and (mended[s].keys_from(s), mended[s].values_from(s)) != (s, s)
            for s in sources
        ):
            mended[layer] = Own()
    try:
        return KVPlan(tuple(mended))
    except KVPlanError:  # no layer owns
        return KVPlan((Own(), *mended[1:]))


def _is_alone(candidate: Candidate) -> bool:
    """Whether the action needs no other layer."""
    layer, action = candidate.layer, candidate.action
    return {action.keys_from(layer), action.values_from(layer)} <= {None, layer}
