"""A sampler whose draws depend on the seed and the number of the trial only.

A resumed study then draws what it would have drawn if it had not been killed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState


class Reseeded(BaseSampler):
    """Makes a sampler anew for every trial, from what the study knows and a seed of its own.

    ``make`` takes a seed. Give it a sampler that remembers nothing but the study and its seed.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._now = make(seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._now = self._make(seed_of(self._seed, trial.number))
        self._now.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._now.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._now.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._now.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self._now.after_trial(study, trial, state, values)


def seed_of(seed: int, number: int) -> int:
    """A seed of 32 bits for the trial ``number`` of a study with this ``seed``."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
