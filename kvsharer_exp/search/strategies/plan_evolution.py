"""The strategy ``evolution`` in a space of plans: solves them at drawn costs, makes offspring.

`samplers.make_sampler` makes it for ``sampler=evolution`` where the space holds plans.

The costs of all actions are drawn from the posterior of a `LossModel` (Thompson sampling), and the
best plan of every rung of bytes under the draw is solved. In half of the draws the rung is the one
whose loss the draw promises to lower most, as a share, in the others it is any rung that was asked
for. Offspring of that rung keep some layers of the best plans so far, and the other layers are
solved anew. The draw, with what was learned of whole plans, orders them. Where all of them are
known, the next draw is twice as wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvsharer_exp.search.spaces.layer_actions import LayerActions, Priced
from kvsharer_exp.search.strategies.memory import Memory
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan

Costs = dict[tuple[int, Action], float]
_DRAWS = 8  # of one proposal, at most


@dataclass(frozen=True, slots=True)
class PlanEvolution:
    """Proposes solved plans and offspring of the best plans (`map_sampler.Strategy`).

    Args:
        elites: number of plans kept per rung, >= 1.
        offspring: number of plans made per draw, >= 1; a tenth of those that maps have.
        explore: scale of the posterior's spread in the draws, >= 0; half of it in the first one.
    """

    elites: int = 3
    offspring: int = 10
    explore: float = 0.7

    def propose(self, memory: Memory, rng: np.random.Generator) -> Iterator[KVPlan]:
        space = memory.space
        assert isinstance(space, LayerActions)
        archive = memory.best(self.elites)
        for wider in range(_DRAWS):
            draw = memory.model.draw(rng, self.explore / 2 * 2**wider)
            priced = Priced(space, costs_of(memory, draw))
            solved = priced.solve(space.rungs) or priced.solve()
            if rng.random() < 0.5:
                rung = _most_promising(memory, draw, solved)
            else:
                rung = int(rng.choice(list(solved)))
            near = sorted(archive, key=lambda r: (abs(r - rung), r))[:3]
            parents = [parent for r in near for parent in archive[r]]
            made = [solved[rung]]
            for _ in range(self.offspring if parents else 0):
                parent = parents[rng.integers(len(parents))]
                child = self._child(priced, parent, rung, rng)
                if child is not None:
                    made.append(child)
            yield from memory.ranked((p for p in made if space.rung(p) <= rung), draw)

    def _child(
        self,
        priced: Priced,
        parent: KVPlan,
        rung: int,
        rng: np.random.Generator,
    ) -> KVPlan | None:
        """The plan that keeps most layers of ``parent``, while the others are solved anew.

        There is none if what is kept is too much.
        """
        anew = rng.random(parent.num_layers) < rng.uniform(0.1, 0.6)
        kept = {
            layer: action
            for layer, action in enumerate(parent.actions)
            if not anew[layer] and action.keys_from(layer) in (None, layer)
        }
        try:
            return priced.solve_within(rung, kept)
        except InputError:  # what is kept is no candidate any more
            return None


def costs_of(memory: Memory, draw: np.ndarray) -> Costs:
    """By layer and action, what it costs under ``draw``; 16 bits cost nothing."""
    costs: Costs = {(layer, Own()): 0.0 for layer in range(memory.space.ranking.num_layers)}
    return costs | dict(zip(memory.model.terms.keys, draw.tolist(), strict=True))


def _most_promising(memory: Memory, draw: np.ndarray, solved: dict[int, KVPlan]) -> int:
    """The rung whose least loss so far its solved plan should lower by the largest share."""
    known, lowest = memory.known, memory.lowest()
    new = {rung: plan for rung, plan in solved.items() if plan not in known}
    if not new:
        return min(solved)
    losses = memory.model.expected(list(new.values()), draw)
    best = {rung: min((lowest[r] for r in lowest if r <= rung), default=np.inf) for rung in new}
    gains = [
        np.log(max(best[rung], 1e-12)) - np.log(max(loss, 1e-12))
        for rung, loss in zip(new, losses, strict=True)
    ]
    return list(new)[int(np.argmax(gains))]
