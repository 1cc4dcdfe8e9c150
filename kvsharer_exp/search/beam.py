"""Forward selection by measured joint loss, as an Optuna sampler.

The best ``width`` maps of one size are extended by one more pair each; the extensions are tried in
the order of the losses that `LossModel` expects of them, ``tries`` per size, and the best of those
measured are extended next. When every size has had its turn the next round tries as many more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial

from kvsharer_exp.search.memory import Memory
from kvsharer_exp.search.spaces import SearchSpace
from kvsharer_exp.sharing_map import SharingMap


class MapBeam(BaseSampler):
    """Samples parameters of ``space`` that decode to extensions of the best maps.

    Args:
        space: any space whose ``encode`` takes most maps (``layer_sources`` takes all).
        width: maps of a size that are extended.
        tries: maps measured per size and round.
    """

    def __init__(self, space: SearchSpace, *, seed: int, width: int = 2, tries: int = 10) -> None:
        self._memory = Memory(space)
        self._width, self._tries = width, tries
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
        sizes = range(1, memory.space.max_shared + 1)
        tried = {size: memory.count(size) for size in sizes}
        rounds = min(tried.values()) // self._tries
        for more in range(rounds + 1, rounds + 4):
            for size in sizes:
                params = self._extend(size) if tried[size] < more * self._tries else None
                if params is not None:
                    return params
        return {}  # nothing new was found: every parameter is then drawn by itself

    def _extend(self, size: int) -> dict[str, Any] | None:
        """Of the untried extensions to ``size`` targets the one expected to lose least."""
        memory, best, known = self._memory, self._memory.best(self._width), self._memory.known
        # Single pairs are where the model learns: there what is uncertain gets tried as well.
        costs = memory.model.draw(self._rng, 1.0 if size == 1 else 0.0)
        made: set[SharingMap] = set()
        for parent in best.get(size - 1, []):
            for target, source in memory.model.pairs:
                if target not in parent.targets:
                    made.add(parent.share(target, source))
        order = sorted(made - known, key=lambda m: (memory.cost(costs, m), m.kv_source_layers))
        encoded = (memory.space.encode(child) for child in order)
        return next((params for params in encoded if params is not None), None)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._independent.sample_independent(study, trial, param_name, param_distribution)
