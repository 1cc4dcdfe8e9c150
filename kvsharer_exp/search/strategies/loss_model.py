"""Predicts what each shared pair costs, learned from the maps scored so far.

`Memory` fits it to the trials of a study. The strategies `Evolution` and `Beam` order the maps that
they propose by the losses it predicts.

It rests on measurements of SmolLM2 (435 single pairs, 360 maps of 2 to 9 targets, KL). The loss of
a map is close to the sum of the losses of its pairs, times a factor that grows slowly with their
number. The log of the rest has a standard deviation of 0.09. The log loss of a pair is smooth over
target and source layers. It follows the log of the pair's block error (`calibration.block_errors`)
but for a factor of the target. Therefore the log losses of all pairs have a Gaussian prior that is
smooth over layers. A scored map is an observation of the log of the sum of its pairs' losses, which
is linearised at the current estimate (Gauss-Newton; the posterior is Laplace's).

The rest is alike for maps that are alike, so it is predicted as well, by a Gaussian process over
the part of the targets that two maps treat differently. On the maps of a sweep, each predicted from
those before it, this lowered the median error from 3 % to 2 %.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvsharer_exp.values.ranking import DissimilarityRanking
from kvsharer_exp.values.sharing_map import SharingMap

# Standard deviations by target, by source and by pair: of the log losses, and of what block errors
# do not tell of them. Fitted to the single pairs by marginal likelihood, and rounded.
_UNTOLD, _TOLD = (0.8, 0.35, 0.25), (0.4, 0.1, 0.1)
_SLOPE_SD = 0.4  # of the slope of log loss over log block error; its mean is 1
_SMOOTH, _REACH = 0.9, 3.0  # share of variance that neighbours have in common; its reach in layers
_CENTRE_SD, _GROWTH_SD = 2.0, 0.2  # of the level of all pairs; of the growth exponent
_NOISE_SD = 0.1
# Of the rest: its standard deviation, the part of different targets at which its covariance has
# fallen to 1/e, the standard deviation of what no other map tells, and how many of the latest maps
# are asked.
_REST_SD, _REST_REACH, _REST_NOISE, _REST_MAPS = 0.1, 0.5, 0.03, 1000
_TINY = 1e-9  # block errors count as at least this: two layers may hold the same KV
_STEPS = 2  # Gauss-Newton steps of a fit, which starts where the one before ended


class LossModel:
    """The log loss of every pair of ``ranking`` that may share, with its uncertainty.

    A map of n targets is predicted to lose n ** growth × the sum of its pairs' losses, corrected by
    the rest. With ``errors`` (``[target][source]``, from `calibration.block_errors`) the order of
    the pairs is known beforehand, and scored maps correct it.
    """

    def __init__(
        self,
        ranking: DissimilarityRanking,
        errors: Sequence[Sequence[float]] | None = None,
    ) -> None:
        self.pairs = [(pair.target, pair.source) for pair in ranking.pairs]
        self._index = {pair: i for i, pair in enumerate(self.pairs)}
        targets, sources = (np.array(side) for side in zip(*self.pairs, strict=True))
        self.told = errors is not None
        by_target, by_source, by_pair = _TOLD if self.told else _UNTOLD
        covariance = by_target**2 * _alike(targets) + by_source**2 * _alike(sources)
        covariance += by_pair**2 * np.eye(len(self.pairs)) + _CENTRE_SD**2
        expected = np.zeros(len(self.pairs))
        if errors is not None:
            told = np.array([errors[target][source] for target, source in self.pairs])
            most = told[np.isfinite(told)].max(initial=_TINY)  # of a pair that does not overflow
            expected = np.log(np.clip(told, _TINY, most))
            expected -= expected.mean()
            covariance += _SLOPE_SD**2 * np.outer(expected, expected)
        size = len(self.pairs) + 1  # the last unknown is `growth`
        self._prior = np.zeros((size, size))
        self._prior[:-1, :-1] = np.linalg.inv(covariance)
        self._prior[-1, -1] = 1 / _GROWTH_SD**2
        self.mean = self._expected = np.append(expected, 0.0)
        self._root = _root_of_inverse(self._prior)
        self._fitted = np.empty((0, ranking.num_layers), dtype=int)  # sources by map and layer
        self._weights = np.empty(0)

    def fit(
        self,
        maps: Sequence[SharingMap],
        losses: Sequence[float],
        doubts: Sequence[float] | None = None,
    ) -> None:
        """Learn from ``maps``, each with a target, and their ``losses``, all above 0.

        ``doubts``: the standard deviations of the measured log losses; None when they are certain.
        """
        doubt = np.zeros(len(maps)) if doubts is None else np.array(doubts)
        certainty = 1 / (_NOISE_SD**2 + doubt**2)
        outcomes = np.log(losses)
        members = np.zeros((len(maps), len(self.pairs)), dtype=bool)
        for row, sharing_map in enumerate(maps):
            members[row, self.indices(sharing_map)] = True
        log_sizes = np.log(members.sum(1))

        def parts() -> np.ndarray:
            return np.where(members, np.exp(self.mean[:-1]), 0.0)

        # The prior leaves the level of the losses open: the first fit starts from the observed one.
        if self.mean is self._expected:
            level = (outcomes - np.log(parts().sum(1))).mean()
            self.mean = self._expected + np.append(np.full(len(self.pairs), level), 0.0)
        for _ in range(_STEPS):
            each = parts()
            sums = each.sum(1)
            slopes = np.column_stack([each / sums[:, None], log_sizes])
            rest = outcomes - np.log(sums) - log_sizes * self.mean[-1] + slopes @ self.mean
            weighted = slopes.T * certainty
            precision = self._prior + weighted @ slopes
            known = weighted @ rest + self._prior @ self._expected
            self.mean = np.linalg.solve(precision, known)
        self._root = _root_of_inverse(precision)
        rest = (outcomes - np.log(parts().sum(1)) - log_sizes * self.mean[-1])[-_REST_MAPS:]
        self._fitted = _sources(maps[-_REST_MAPS:])
        known = _kinship(self._fitted, self._fitted)
        known += np.diag(_REST_NOISE**2 + doubt[-_REST_MAPS:] ** 2)
        self._weights = np.linalg.solve(known, rest)

    @property
    def growth(self) -> float:
        """The exponent of the number of targets in a predicted loss."""
        return float(self.mean[-1])

    def expected(self, maps: Sequence[SharingMap], costs: np.ndarray) -> np.ndarray:
        """Predict the losses of ``maps``, (num_maps,), where pairs lose ``costs``, (num_pairs,)."""
        sums = np.array([costs[self.indices(sharing_map)].sum() for sharing_map in maps])
        sizes = np.array([len(sharing_map.targets) for sharing_map in maps], dtype=float)
        rest = _kinship(_sources(maps), self._fitted) @ self._weights
        return sizes**self.growth * sums * np.exp(rest)

    def indices(self, sharing_map: SharingMap) -> list[int]:
        """The positions in ``pairs`` of the pairs that the map uses."""
        sources = sharing_map.kv_source_layers
        return [self._index[target, sources[target]] for target in sharing_map.targets]

    def draw(self, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
        """Draw the losses of all pairs, (num_pairs,), from the posterior (Thompson sampling).

        ``scale`` scales the spread of the draw; 0 gives the estimate.
        """
        noise = rng.standard_normal(len(self.mean))
        return np.exp((self.mean + scale * self._root @ noise)[:-1])


def _sources(maps: Sequence[SharingMap]) -> np.ndarray:
    return np.array([sharing_map.kv_source_layers for sharing_map in maps])


def _kinship(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The covariance (some, others) of the rests of two groups of maps (num_maps, num_layers)."""
    different = (some[:, None] != others).sum(2)
    targets = [(maps != np.arange(maps.shape[1])).sum(1) for maps in (some, others)]
    most = np.maximum(targets[0][:, None], targets[1])
    return _REST_SD**2 * np.exp(-different / most / _REST_REACH)


def _alike(layers: np.ndarray) -> np.ndarray:
    near = np.exp(-np.abs(layers[:, None] - layers) / _REACH)
    return _SMOOTH * near + (1 - _SMOOTH) * (layers[:, None] == layers)


def _root_of_inverse(precision: np.ndarray) -> np.ndarray:
    """The R with R Rᵀ = precision⁻¹, which turns white noise into draws."""
    return np.linalg.inv(np.linalg.cholesky(precision)).T
