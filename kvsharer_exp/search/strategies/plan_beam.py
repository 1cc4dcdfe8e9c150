"""The strategy ``beam`` in a space of plans: goes down the rungs, one changed layer at a time.

`samplers.make_sampler` makes it for ``sampler=beam`` where the space holds plans.

From the best plans of every rung, each layer is given each of its actions that keeps less. What is
expected to lose least comes first, and every sixteenth of the bytes gets as many tries as every
other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvsharer_exp.search.spaces.layer_actions import LayerActions
from kvsharer_exp.search.strategies.memory import Memory
from kvsharer_exp.values.plan import KVPlan, KVPlanError


@dataclass(frozen=True, slots=True)
class PlanBeam:
    """Proposes extensions of the best plans (`map_sampler.Strategy`).

    Args:
        width: number of plans of each rung that are extended, >= 1.
        tries: number of plans measured per sixteenth of the bytes and round, >= 1.
    """

    width: int = 2
    tries: int = 10

    def propose(self, memory: Memory, rng: np.random.Generator) -> Iterator[KVPlan]:
        space = memory.space
        assert isinstance(space, LayerActions)
        costs = memory.model.draw(rng, 0.0)
        archive = memory.best(self.width)
        full = KVPlan.full(len(space.at))
        parents = [
            full,
            *(plan for rung in sorted(archive, reverse=True) for plan in archive[rung]),
        ]
        low, _ = space.rungs
        children: dict[int, set[KVPlan]] = {}
        for parent in parents:
            for child in self._extensions(space, parent):
                if space.rung(child) >= low:
                    children.setdefault(_sixteenth(space, child), set()).add(child)
        known = memory.known
        tried = Counter(_sixteenth(space, plan) for plan in known)
        for step in sorted(children, key=lambda s: (tried[s] // self.tries, -s)):
            yield from memory.ranked(children[step] - known, costs)

    def _extensions(self, space: LayerActions, parent: KVPlan) -> Iterator[KVPlan]:
        """The plans in which one layer of ``parent`` keeps less than it does there."""
        kept = space.kv_bytes(parent)
        for of_layer in space.at:
            for candidate in of_layer:
                try:
                    child = parent.replace(candidate.layer, candidate.action)
                except KVPlanError:  # another layer reads this one
                    continue
                if space.kv_bytes(child) < kept and space.encode(child) is not None:
                    yield child


def _sixteenth(space: LayerActions, plan: KVPlan) -> int:
    return 16 * space.kv_bytes(plan) // space.full_bytes
