"""The strategy ``evolution``: offspring of the best maps, ordered by what the trials taught.

`samplers.make_sampler` makes it for ``sampler=evolution``, and `MapSampler` asks it for maps.

An archive keeps the best maps of every size (number of shared layers). The losses of all pairs are
drawn from the posterior of a `LossModel` (Thompson sampling), so that uncertain pairs get tried. In
half of the draws the size is the one whose loss the draw promises to lower most, in the others it
is any size. Offspring of that size are made from the archive by adding, dropping, moving and
swapping targets and by crossing two maps. The draw orders the offspring. The map that looks best
under the draw is one of them. The cheap ``screen`` stage then decides which maps are scored on all
tokens. This is staged selection as in EvoPress, https://arxiv.org/abs/2410.14649.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvsharer_exp.search.strategies.memory import Memory
from kvsharer_exp.values.errors import InputError, at_least
from kvsharer_exp.values.sharing_map import SharingMap


@dataclass(frozen=True, slots=True)
class Evolution:
    """Proposes offspring of the best maps (`map_sampler.Strategy`).

    Args:
        elites: number of maps kept per size, >= 1.
        offspring: number of maps made per draw, which the model then orders, >= 1.
        explore: scale of the posterior's spread in the draw, >= 0; 0 always takes the map that is
            predicted to be best.
    """

    elites: int = 3
    offspring: int = 100
    explore: float = 0.7

    def __post_init__(self) -> None:
        at_least("sampler.options.elites", self.elites, 1)
        at_least("sampler.options.offspring", self.offspring, 1)
        if not isinstance(self.explore, (int, float)) or self.explore < 0:
            raise InputError(f"sampler.options.explore={self.explore}: give a number, at least 0")

    def propose(self, memory: Memory, rng: np.random.Generator) -> Iterator[SharingMap]:
        archive = memory.best(self.elites)
        # Without block errors, as many single pairs as there are layers come first. They teach most
        # for their price, because the first stage stops most of them.
        young = not memory.model.told and memory.counts()[1] < memory.space.ranking.num_layers
        for attempt in range(4):
            costs = memory.model.draw(rng, self.explore)
            favourites = _favourites(memory, costs)
            if memory.model.told:
                yield from _singles(memory, favourites)
            if young and attempt == 0:
                size = 1
            elif rng.random() < 0.5:
                size = _most_promising(memory, costs, favourites)
            else:
                size = int(rng.integers(1, memory.space.max_shared + 1))
            made = [*favourites.values(), *self._make(memory, rng, archive, size)]
            yield from memory.ranked((m for m in made if len(m.targets) == size), costs)

    def _make(
        self,
        memory: Memory,
        rng: np.random.Generator,
        archive: dict[int, list[SharingMap]],
        size: int,
    ) -> Iterator[SharingMap]:
        """Make offspring with ``size`` targets from the archive's maps of the nearest sizes."""
        sizes = sorted(archive, key=lambda s: (abs(s - size), s))
        near = [parent for s in sizes[:3] for parent in archive[s]]
        for _ in range(self.offspring):
            child = near[rng.integers(len(near))]
            if rng.random() < 0.25:
                child = _cross(rng, child, near[rng.integers(len(near))])
            if rng.random() < 0.5 and child.targets:
                child = _drop(rng, child)  # with an addition below: a swap or a moved source
            while len(child.targets) > size:
                child = _drop(rng, child)
            while len(child.targets) < size:
                child = _add(rng, child, memory.model.terms.keys)
            yield child


def _cross(rng: np.random.Generator, one: SharingMap, two: SharingMap) -> SharingMap:
    """Each layer wishes for its source in one of the two; wishes are granted from the input up."""
    child = SharingMap.identity(one.num_layers)
    for layer in range(one.num_layers):
        parent = one if rng.random() < 0.5 else two
        source = parent.kv_source_layers[layer]
        if source != layer:
            child = child.share(layer, source)
    return child


def _drop(rng: np.random.Generator, child: SharingMap) -> SharingMap:
    target = child.targets[rng.integers(len(child.targets))]
    sources = list(child.kv_source_layers)
    sources[target] = target
    return SharingMap(tuple(sources))


def _add(
    rng: np.random.Generator, child: SharingMap, pairs: Sequence[tuple[int, int]]
) -> SharingMap:
    """Add a pair that may share, whose target is no target yet; chains end at an owner."""
    targets = set(child.targets)
    free = [(target, source) for target, source in pairs if target not in targets]
    target, source = free[rng.integers(len(free))]
    return child.share(target, source)


def _favourites(memory: Memory, costs: np.ndarray) -> dict[int, SharingMap]:
    """By size, the map of the cheapest pairs that fit together: no source is a target."""
    child = memory.identity
    found: dict[int, SharingMap] = {}
    targets: set[int] = set()
    read: set[int] = set()
    for index in np.argsort(costs, kind="stable"):
        target, source = memory.model.terms.keys[index]
        if target not in targets | read and source not in targets:
            child = child.share(target, source)
            targets.add(target)
            read.add(source)
            found[len(targets)] = child
        if len(targets) == memory.space.max_shared:
            break
    return found


def _singles(memory: Memory, favourites: dict[int, SharingMap]) -> Iterator[SharingMap]:
    """Each pair of the largest favourite on its own, if its target was not tried on its own yet.

    Block errors may misjudge a target, which would otherwise never be met. Seeds are not tries.
    """
    untried, largest = memory.untried(), favourites[max(favourites)]
    for target in largest.targets:
        if target in untried:
            yield memory.identity.share(target, largest.kv_source_layers[target])


def _most_promising(memory: Memory, costs: np.ndarray, favourites: dict[int, SharingMap]) -> int:
    """The size whose best loss so far its favourite is expected to lower most.

    This gain is what the hypervolume counts.
    """
    lowest, known = memory.lowest(), memory.known
    new = {size: favourite for size, favourite in favourites.items() if favourite not in known}
    if not new:
        return min(favourites)
    losses = memory.model.expected(list(new.values()), costs)
    gains = [lowest.get(size, np.inf) - loss for size, loss in zip(new, losses, strict=True)]
    return list(new)[int(np.argmax(gains))]
