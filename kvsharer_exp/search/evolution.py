"""Our Optuna sampler for maps: evolution whose offspring are ordered by what trials taught.

An archive keeps the best maps of every size (number of shared layers). For a drawn size, offspring
are made from the archive by adding, dropping, moving and swapping targets and by crossing two
maps. A `LossModel` orders them, with losses of pairs drawn from its posterior (Thompson sampling),
so that what is uncertain gets tried; the map that looks best under the draw is one of them. The
cheap ``screen`` stage then decides who is scored on all tokens: staged selection as in EvoPress,
https://arxiv.org/abs/2410.14649.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial

from kvsharer_exp.search.memory import Memory
from kvsharer_exp.search.spaces import SearchSpace
from kvsharer_exp.sharing_map import SharingMap


class MapEvolution(BaseSampler):
    """Samples parameters of ``space`` that decode to promising maps.

    Args:
        space: any space whose ``encode`` takes most maps (``layer_sources`` takes all).
        elites: maps kept per size.
        offspring: maps made per draw, of which the model chooses one.
        explore: scale of the posterior's spread in the draw; 0 always takes the best predicted.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        elites: int = 3,
        offspring: int = 100,
        explore: float = 0.7,
    ) -> None:
        self._memory = Memory(space)
        self._elites, self._offspring, self._explore = elites, offspring, explore
        self._rng = np.random.default_rng(seed)
        self._independent = RandomSampler(seed=seed)

    def reseed_rng(self) -> None:
        self._rng = np.random.default_rng()
        self._independent.reseed_rng()

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._memory.space.distributions()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        memory = self._memory
        memory.update(study)
        archive, known = memory.best(self._elites), memory.known
        for size in self._sizes():
            costs = memory.model.draw(self._rng, self._explore)
            made = {self._favourite(costs, size), *self._make(archive, size)} - known
            made = {child for child in made if len(child.targets) == size}
            for child in sorted(made, key=lambda c: (memory.cost(costs, c), c.kv_source_layers)):
                params = memory.space.encode(child)
                if params is not None:
                    return params
        return {}  # nothing new was found: every parameter is then drawn by itself

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def _sizes(self) -> Iterator[int]:
        """Sizes to try: single layers first, they teach most for their price; then all alike."""
        space = self._memory.space
        if self._memory.count(1) < space.ranking.num_layers:
            yield 1
        yield from self._rng.integers(1, space.max_shared + 1, size=3).tolist()

    def _make(self, archive: dict[int, list[SharingMap]], size: int) -> Iterator[SharingMap]:
        """Offspring of ``size`` targets from the archive's maps of the nearest sizes."""
        sizes = sorted(archive, key=lambda s: (abs(s - size), s))
        near = [parent for s in sizes[:3] for parent in archive[s]]
        for _ in range(self._offspring):
            child = near[self._rng.integers(len(near))]
            if self._rng.random() < 0.25:
                child = self._cross(child, near[self._rng.integers(len(near))])
            if self._rng.random() < 0.5 and child.targets:
                child = self._drop(child)  # with the next line: a swap or a moved source
            while len(child.targets) > size:
                child = self._drop(child)
            while len(child.targets) < size:
                child = self._add(child)
            yield child

    def _cross(self, one: SharingMap, two: SharingMap) -> SharingMap:
        """Each layer wishes what one of the two does; wishes come true from the input up."""
        child = SharingMap.identity(one.num_layers)
        for layer in range(one.num_layers):
            parent = one if self._rng.random() < 0.5 else two
            source = parent.kv_source_layers[layer]
            if source != layer:
                child = child.share(layer, source)
        return child

    def _drop(self, child: SharingMap) -> SharingMap:
        target = child.targets[self._rng.integers(len(child.targets))]
        sources = list(child.kv_source_layers)
        sources[target] = target
        return SharingMap(tuple(sources))

    def _add(self, child: SharingMap) -> SharingMap:
        """One more pair of the ranking: a target that is none yet, a source that keeps its KV."""
        targets = set(child.targets)
        free = [(t, s) for t, s in self._memory.model.pairs if t not in targets]
        target, source = free[self._rng.integers(len(free))]
        return child.share(target, source)

    def _favourite(self, costs: np.ndarray, size: int) -> SharingMap:
        """The cheapest pairs that fit together: no source is a target."""
        child = self._memory.identity
        targets: set[int] = set()
        read: set[int] = set()
        for index in np.argsort(costs, kind="stable"):
            target, source = self._memory.model.pairs[index]
            if target not in targets | read and source not in targets:
                child = child.share(target, source)
                targets.add(target)
                read.add(source)
            if len(targets) == size:
                break
        return child
