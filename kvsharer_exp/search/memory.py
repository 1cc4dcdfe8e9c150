"""What our samplers remember of a study: its results, the best maps of every size, pair losses."""

from __future__ import annotations

from collections import Counter

import numpy as np
import optuna

from kvsharer_exp.records import TrialResult
from kvsharer_exp.search.loss_model import LossModel
from kvsharer_exp.search.spaces import SearchSpace
from kvsharer_exp.search.stages import SCREEN
from kvsharer_exp.sharing_map import SharingMap


class Memory:
    """Read from the study's trials, so a resumed study remembers as much."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.model = LossModel(space.ranking)
        self._results: dict[int, TrialResult] = {}

    def update(self, study: optuna.Study) -> None:
        """Take in the trials that ended since, and fit the model to all losses above 0."""
        for trial in study.get_trials(deepcopy=False):
            if trial.number not in self._results and "result" in trial.user_attrs:
                result = TrialResult.from_json(trial.user_attrs["result"])
                if result.status != "failed":
                    self._results[trial.number] = result
        losses = [(r.sharing_map, _loss(r)) for r in self._results.values()]
        seen = [(shared, loss) for shared, loss in losses if shared.targets and loss > 0]
        if seen:
            maps, values = zip(*seen, strict=True)
            self.model.fit(maps, values)

    @property
    def identity(self) -> SharingMap:
        return SharingMap.identity(self.space.ranking.num_layers)

    @property
    def known(self) -> set[SharingMap]:
        return {result.sharing_map for result in self._results.values()}

    def counts(self) -> Counter[int]:
        """How many maps of each size were tried so far."""
        return Counter(len(shared.targets) for shared in self.known)

    def best(self, each: int) -> dict[int, list[SharingMap]]:
        """The ``each`` best complete maps of every size, best first; size 0 is the full cache."""
        complete = [result for result in self._results.values() if result.score is not None]
        complete.sort(key=lambda result: (-(result.score or 0.0), result.number))
        found = {0: [self.identity]}
        for result in complete:
            kept = found.setdefault(len(result.sharing_map.targets), [])
            if len(kept) < each and result.sharing_map not in kept:
                kept.append(result.sharing_map)
        return found

    def cost(self, costs: np.ndarray, sharing_map: SharingMap) -> float:
        """Sum of ``costs`` (one for each pair of the model) over the map's pairs."""
        return float(costs[self.model.indices(sharing_map)].sum())


def _loss(result: TrialResult) -> float:
    """The loss on the first windows, which every map has; minus the score without that stage."""
    return result.scores.get(SCREEN, -(result.score or 0.0))
