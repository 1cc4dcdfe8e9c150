"""One search space, one sampler, one scorer; `pyproject.toml` makes their names known."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial

from kvsharer_exp.extend import Fitness, SearchSpace, SharingMap, Space, or_first_pair

WORST_WINDOW = Fitness(reference=4.0, loss=lambda shared, full: max(shared.kls))
"""KL of the window that suffers most, nats."""


@dataclass(frozen=True)
class Window(Space):
    """One run of neighbouring layers reads the layer ``reach`` before it, where each may."""

    reach: int = 1

    def distributions(self) -> dict[str, BaseDistribution]:
        last = self.ranking.num_layers - 1
        return {
            "first": IntDistribution(self.reach, last),
            "length": IntDistribution(1, self.max_shared),
        }

    def decode(self, params: Mapping[str, Any]) -> SharingMap:
        first, source = params["first"], params["first"] - self.reach
        sharing_map = SharingMap.identity(self.ranking.num_layers)
        for target in range(first, min(first + params["length"], self.ranking.num_layers)):
            if source in self.setting.sources.get(target, ()):
                sharing_map = sharing_map.share(target, source)
        return or_first_pair(sharing_map, self.ranking)

    def encode(self, sharing_map: SharingMap) -> dict[str, Any] | None:
        targets = sharing_map.targets
        if not targets or targets[0] < self.reach or len(targets) > self.max_shared:
            return None
        params = {"first": targets[0], "length": len(targets)}
        return params if self.decode(params) == sharing_map else None


class FrontMix(BaseSampler):
    """Each parameter as in some trial of the front, or, with probability ``anew``, at random."""

    def __init__(self, seed: int, space: SearchSpace, *, anew: float = 0.2) -> None:
        self._rng, self._random, self._anew = random.Random(seed), RandomSampler(seed=seed), anew

    def infer_relative_search_space(self, *arguments: Any) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, *arguments: Any) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        known = [best.params[name] for best in study.best_trials if name in best.params]
        if known and self._rng.random() > self._anew:
            return self._rng.choice(known)
        return self._random.sample_independent(study, trial, name, distribution)
