"""Our Optuna sampler: a strategy proposes maps, and the first new one in the space is drawn.

`samplers.make_sampler` makes it for our strategies, `Evolution` and `Beam`.

https://optuna.readthedocs.io/en/stable/reference/samplers/generated/optuna.samplers.BaseSampler.html
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial

from kvsharer_exp.search.reseeded import Reseeded, seed_of
from kvsharer_exp.search.spaces.base import SearchSpace
from kvsharer_exp.search.strategies.memory import Memory

_SHARED = 100  # so many trials under way let a proposal serve one more


class Strategy(Protocol):
    """Decides which sharing maps or plans are worth scoring next."""

    def propose(self, memory: Memory, rng: np.random.Generator) -> Iterator[Any]:
        """Yield maps (or plans, if the space holds plans) worth scoring, the best first.

        It ends when there is nothing more to propose.
        """


class MapSampler(Reseeded):
    """Samples parameters of ``space`` that decode to a map or plan that ``strategy`` proposes.

    What is proposed at once serves one trial, and one more for every hundred that are under way:
    among hundreds of them, the few results that come between two trials teach next to nothing.

    ``space``: any space whose ``encode`` takes most maps (``layer_sources`` takes all). ``errors``:
    the block errors of the space's pairs (`calibration.block_errors`), where they are known.
    """

    def __init__(
        self,
        space: SearchSpace,
        strategy: Strategy,
        *,
        seed: int,
        errors: Sequence[Sequence[float]] | None = None,
    ) -> None:
        self._memory, self._strategy = Memory(space, errors), strategy
        self._proposed: Iterator[Any] = iter(())
        self._serves = 0  # so many trials more
        super().__init__(lambda seed: RandomSampler(seed=seed), seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._memory.space.distributions()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._memory.update(study)
        known = self._memory.known
        if not self._serves:
            rng = np.random.default_rng(seed_of(self._seed, trial.number))
            self._proposed = self._strategy.propose(self._memory, rng)
            self._serves = 1 + self._memory.under_way // _SHARED
        self._serves -= 1
        for proposed in self._proposed:
            if proposed not in known:
                params = self._memory.space.encode(proposed)
                if params is not None:
                    return params
        self._serves = 0
        return {}  # nothing new: Optuna then draws every parameter by itself
