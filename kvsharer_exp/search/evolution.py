"""Our Optuna sampler for maps: evolution whose offspring are ordered by what trials taught.

An archive keeps the best maps of every size (number of shared layers). For a drawn size, offspring
are made from the archive by adding, dropping, moving and swapping targets and by crossing two
maps. A Bayesian linear model of the log loss (which layer reads, which is read, how many) orders
them, with weights drawn from its posterior (Thompson sampling), so that what is uncertain gets
tried. The cheap ``screen`` stage then decides who is scored on all tokens: staged selection as in
EvoPress, https://arxiv.org/abs/2410.14649.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial

from kvsharer_exp.records import TrialResult
from kvsharer_exp.search.spaces import SearchSpace
from kvsharer_exp.search.stages import SCREEN
from kvsharer_exp.sharing_map import SharingMap


class MapEvolution(BaseSampler):
    """Samples parameters of ``space`` that decode to promising maps.

    Args:
        space: any space whose ``encode`` takes most maps (``layer_sources`` takes all).
        elites: maps kept per size.
        offspring: maps made per draw, of which the model chooses one.
        explore: scale of the posterior's spread in the draw; 0 always takes the best predicted.
        prior: ridge strength of the model, in units of one observation.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        elites: int = 3,
        offspring: int = 300,
        prior: float = 2.0,
        explore: float = 0.2,
    ) -> None:
        self._space = space
        self._pairs = [(pair.target, pair.source) for pair in space.ranking.pairs]
        self._elites, self._offspring, self._prior = elites, offspring, prior
        self._explore = explore
        self._rng = np.random.default_rng(seed)
        self._independent = RandomSampler(seed=seed)
        self._results: dict[int, TrialResult] = {}

    def reseed_rng(self) -> None:
        self._rng = np.random.default_rng()
        self._independent.reseed_rng()

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._space.distributions()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._learn(study)
        archive = self._archive()
        known = {result.sharing_map for result in self._results.values()}
        for _ in range(20):
            size = self._draw_size()
            made = {
                child for child in self._make(archive, size) if len(child.targets) == size
            } - known
            ordered = self._ordered(sorted(made, key=lambda child: child.kv_source_layers))
            for child in ordered:
                params = self._space.encode(child)
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

    def _draw_size(self) -> int:
        """Small maps first: they teach what a layer costs; then every size alike."""
        young = len(self._results) < 2 * self._space.ranking.num_layers
        return int(self._rng.integers(1, min(3 if young else 10**9, self._space.max_shared) + 1))

    def _learn(self, study: optuna.Study) -> None:
        for trial in study.get_trials(deepcopy=False):
            if trial.number not in self._results and "result" in trial.user_attrs:
                result = TrialResult.from_json(trial.user_attrs["result"])
                if result.status != "failed":
                    self._results[trial.number] = result

    def _archive(self) -> dict[int, list[SharingMap]]:
        """The best maps by size; size 0 is the full cache."""
        complete = [result for result in self._results.values() if result.score is not None]
        complete.sort(key=lambda result: (-(result.score or 0.0), result.number))
        archive = {0: [SharingMap.identity(self._space.ranking.num_layers)]}
        for result in complete:
            kept = archive.setdefault(len(result.sharing_map.targets), [])
            if len(kept) < self._elites and result.sharing_map not in kept:
                kept.append(result.sharing_map)
        return archive

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
        free = [(t, s) for t, s in self._pairs if t not in targets]
        target, source = free[self._rng.integers(len(free))]
        return child.share(target, source)

    def _ordered(self, children: list[SharingMap]) -> list[SharingMap]:
        """By predicted log loss under weights drawn from the posterior, lowest first."""
        if not children:
            return []
        seen = [(r.sharing_map, _loss(r)) for r in self._results.values()]
        seen = [(shared, loss) for shared, loss in seen if loss > 0]
        if not seen:
            return [children[i] for i in self._rng.permutation(len(children))]
        inputs = np.stack([_features(shared) for shared, _ in seen])
        outputs = np.log([loss for _, loss in seen])
        precision = inputs.T @ inputs + self._prior * np.eye(inputs.shape[1])
        mean = np.linalg.solve(precision, inputs.T @ (outputs - outputs.mean()))
        residual = outputs - outputs.mean() - inputs @ mean
        noise = math.sqrt(float(residual @ residual) / len(outputs)) + 1e-3
        factor = np.linalg.cholesky(np.linalg.inv(precision))
        drawn = mean + self._explore * noise * factor @ self._rng.standard_normal(len(mean))
        predicted = np.stack([_features(child) for child in children]) @ drawn
        return [children[i] for i in np.argsort(predicted, kind="stable")]


def _loss(result: TrialResult) -> float:
    """The loss on the first windows, which every map has; minus the score without that stage."""
    return result.scores.get(SCREEN, -(result.score or 0.0))


def _features(sharing_map: SharingMap) -> np.ndarray:
    """(2 × num_layers + 2,): which layers read, how often each is read, how many, their log."""
    layers = sharing_map.num_layers
    row = np.zeros(2 * layers + 2)
    for target in sharing_map.targets:
        row[target] = 1
        row[layers + sharing_map.kv_source_layers[target]] += 1
    row[-2] = len(sharing_map.targets) / 4
    row[-1] = math.log(len(sharing_map.targets) + 1)
    return row
