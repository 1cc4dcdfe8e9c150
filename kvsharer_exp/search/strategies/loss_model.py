"""Predicts what each part of a plan costs, learned from the plans scored so far.

`Memory` and `PlanMemory` fit it to the trials of a study. The strategies order the maps and plans
that they propose by the losses it predicts. What the parts are is said by its `Terms`: the shared
pairs of a map (`pair_terms`), or what each layer of a plan does instead of keeping its KV in 16
bits (`plan_model.action_terms`).

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvsharer_exp.values.ranking import DissimilarityRanking
from kvsharer_exp.values.sharing_map import SharingMap

# Standard deviations by target, by source and by pair: of the log losses, and of what block errors
# do not tell of them. Fitted to the single pairs by marginal likelihood, and rounded.
_UNTOLD, _TOLD = (0.8, 0.35, 0.25), (0.4, 0.1, 0.1)
_SLOPE_SD = 0.4  # of the slope of log loss over log block error; its mean is 1
_SMOOTH, _REACH = 0.9, 3.0  # share of variance that neighbours have in common; its reach in layers
CENTRE_SD, _GROWTH_SD = 2.0, 0.2  # of the level of all pairs; of the growth exponent
_NOISE_SD = 0.1
# Of the rest: its standard deviation, the part of different targets at which its covariance has
# fallen to 1/e, the standard deviation of what no other map tells, and how many of the latest maps
# are asked.
_REST_SD, _REST_REACH, _REST_NOISE, _REST_MAPS = 0.1, 0.5, 0.03, 1000
_FARTHEST = 300.0  # the farthest drawn log loss from 0: sums stay finite, however wide the draw
_TINY = 1e-9  # block errors count as at least this: two layers may hold the same KV
# The most Gauss-Newton steps of a fit, and the change of a log loss that ends it. A fit starts at
# the prior, so that it depends on the results only.
_STEPS, _CHANGE = 8, 1e-3


@dataclass(frozen=True)
class Terms:
    """What the loss of a plan adds up from.

    Attributes:
        keys: the terms, as (target, source) or (layer, action).
        covariance: the prior covariance of their log losses, (terms, terms).
        expected: their prior mean, up to a level that all have in common, (terms,).
        told: whether the order of the terms is known beforehand, from block errors.
        of: gives the positions of a plan's terms.
        size: gives the number of a plan's layers that ``growth`` counts.
        codes: gives a number for what each layer does, (layers,); and for the full cache.
    """

    keys: Sequence[Any]
    covariance: np.ndarray
    expected: np.ndarray
    told: bool
    of: Callable[[Any], list[int]]
    size: Callable[[Any], int]
    codes: Callable[[Any], Sequence[int]]
    full: Any


def pair_terms(
    ranking: DissimilarityRanking, errors: Sequence[Sequence[float]] | None = None
) -> Terms:
    """The pairs of ``ranking`` that may share; ``errors`` is ``[target][source]``."""
    pairs = [(pair.target, pair.source) for pair in ranking.pairs]
    index = {pair: i for i, pair in enumerate(pairs)}
    targets, sources = (np.array(side) for side in zip(*pairs, strict=True))
    by_target, by_source, by_pair = _TOLD if errors is not None else _UNTOLD
    covariance = by_target**2 * alike(targets) + by_source**2 * alike(sources)
    covariance += by_pair**2 * np.eye(len(pairs)) + CENTRE_SD**2
    told = None if errors is None else [errors[target][source] for target, source in pairs]
    covariance, expected = with_errors(covariance, told)
    return Terms(
        pairs,
        covariance,
        expected,
        errors is not None,
        of=lambda m: [index[target, m.kv_source_layers[target]] for target in m.targets],
        size=lambda m: len(m.targets),
        codes=lambda m: m.kv_source_layers,
        full=SharingMap.identity(ranking.num_layers),
    )


def with_errors(
    covariance: np.ndarray, errors: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Add to ``covariance`` that the slope over log block errors is uncertain; give the prior mean.

    ``errors`` are the block errors of the terms; None when they are not known.
    """
    if errors is None:
        return covariance, np.zeros(len(covariance))
    told = np.array(errors)
    most = told[np.isfinite(told)].max(initial=_TINY)  # of a term that does not overflow
    expected = np.log(np.clip(told, _TINY, most))
    expected -= expected.mean()
    return covariance + _SLOPE_SD**2 * np.outer(expected, expected), expected


class LossModel:
    """The log loss of every term, with its uncertainty.

    A plan of size n is predicted to lose n ** growth × the sum of its terms' losses, corrected by
    the rest.
    """

    def __init__(self, terms: Terms) -> None:
        self.terms, self.told = terms, terms.told
        self._expected = np.append(terms.expected, 0.0)
        size = len(terms.keys) + 1  # the last unknown is `growth`
        self._prior = np.zeros((size, size))
        self._prior[:-1, :-1] = np.linalg.inv(terms.covariance)
        self._prior[-1, -1] = 1 / _GROWTH_SD**2
        self.mean = self._expected
        self._root = _root_of_inverse(self._prior)
        self._full = np.array(terms.codes(terms.full))
        self._fitted = np.empty((0, len(self._full)), dtype=int)  # codes by plan and layer
        self._weights = np.empty(0)

    def fit(
        self,
        plans: Sequence[Any],
        losses: Sequence[float],
        doubts: Sequence[float] | None = None,
    ) -> None:
        """Learn from ``plans``, each with a term, and their ``losses``, all above 0.

        ``doubts``: the standard deviations of the measured log losses; None when they are certain.
        """
        doubt = np.zeros(len(plans)) if doubts is None else np.array(doubts)
        certainty = 1 / (_NOISE_SD**2 + doubt**2)
        outcomes = np.log(losses)
        members = np.zeros((len(plans), len(self.terms.keys)), dtype=bool)
        for row, plan in enumerate(plans):
            members[row, self.terms.of(plan)] = True
        log_sizes = np.log([self.terms.size(plan) for plan in plans])

        def parts() -> np.ndarray:
            return np.where(members, np.exp(self.mean[:-1]), 0.0)

        # The prior leaves the level of the losses open: it is the observed one at first.
        self.mean = self._expected
        level = (outcomes - np.log(parts().sum(1))).mean()
        self.mean = self._expected + np.append(np.full(len(self.terms.keys), level), 0.0)
        for _ in range(_STEPS):
            each = parts()
            sums = each.sum(1)
            slopes = np.column_stack([each / sums[:, None], log_sizes])
            rest = outcomes - np.log(sums) - log_sizes * self.mean[-1] + slopes @ self.mean
            weighted = slopes.T * certainty
            precision = self._prior + weighted @ slopes
            known = weighted @ rest + self._prior @ self._expected
            before, self.mean = self.mean, np.linalg.solve(precision, known)
            if np.abs(self.mean - before).max() < _CHANGE:
                break
        self._root = _root_of_inverse(precision)
        rest = (outcomes - np.log(parts().sum(1)) - log_sizes * self.mean[-1])[-_REST_MAPS:]
        self._fitted = self._codes(plans[-_REST_MAPS:])
        known = self._kinship(self._fitted)
        known += np.diag(_REST_NOISE**2 + doubt[-_REST_MAPS:] ** 2)
        self._weights = np.linalg.solve(known, rest)

    @property
    def growth(self) -> float:
        """The exponent of the number of targets in a predicted loss."""
        return float(self.mean[-1])

    def expected(self, plans: Sequence[Any], costs: np.ndarray) -> np.ndarray:
        """Predict the losses of ``plans``, (plans,), where the terms lose ``costs``, (terms,)."""
        sums = np.array([costs[self.terms.of(plan)].sum() for plan in plans])
        sizes = np.array([self.terms.size(plan) for plan in plans], dtype=float)
        rest = self._kinship(self._codes(plans)) @ self._weights
        return sizes**self.growth * sums * np.exp(rest)

    def _codes(self, plans: Sequence[Any]) -> np.ndarray:
        return np.array([self.terms.codes(plan) for plan in plans])

    def _kinship(self, some: np.ndarray) -> np.ndarray:
        """The covariance of the rests of ``some`` plans (codes) and of those that were fitted."""
        different = (some[:, None] != self._fitted).sum(2)
        changed = [(codes != self._full).sum(1) for codes in (some, self._fitted)]
        most = np.maximum(changed[0][:, None], changed[1])
        return _REST_SD**2 * np.exp(-different / most / _REST_REACH)

    def draw(self, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
        """Draw the losses of all terms, (terms,), from the posterior (Thompson sampling).

        ``scale`` scales the spread of the draw; 0 gives the estimate.
        """
        noise = rng.standard_normal(len(self.mean))
        drawn = (self.mean + scale * self._root @ noise)[:-1]
        return np.exp(drawn.clip(-_FARTHEST, _FARTHEST))


def alike(layers: np.ndarray) -> np.ndarray:
    """How alike two terms are by the places of their layers, (terms, terms), 1 for the same."""
    near = np.exp(-np.abs(layers[:, None] - layers) / _REACH)
    return _SMOOTH * near + (1 - _SMOOTH) * (layers[:, None] == layers)


def _root_of_inverse(precision: np.ndarray) -> np.ndarray:
    """The R with R Rᵀ = precision⁻¹, which turns white noise into draws."""
    return np.linalg.inv(np.linalg.cholesky(precision)).T
