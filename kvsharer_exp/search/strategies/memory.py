"""What our samplers remember of a study: its results, its best maps, and what each pair loses.

`MapSampler` updates a `Memory` before each draw, and the strategies read it. Other packages may use
it for strategies of their own (`kvsharer_exp.extend`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

import numpy as np
import optuna
from optuna.trial import TrialState

from kvsharer_exp.search.front import by_size
from kvsharer_exp.search.spaces.base import SearchSpace
from kvsharer_exp.search.stages import FIT, screens
from kvsharer_exp.search.strategies.loss_model import LossModel
from kvsharer_exp.search.study_store import result_of
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import SAMPLED, TrialResult


class Memory:
    """Remembers the trials of a study; what it knows is read from them, also in a resumed study.

    ``errors``: the block errors of the pairs, known before the first trial (see `LossModel`). The
    attribute ``model`` is the `LossModel`, and ``space`` the search space.
    """

    def __init__(self, space: SearchSpace, errors: Sequence[Sequence[float]] | None = None) -> None:
        self.space = space
        self.model = LossModel(space.ranking, errors)
        self._results: dict[int, TrialResult] = {}
        self._under_way: set[SharingMap] = set()

    def update(self, study: optuna.Study) -> None:
        """Take in the trials that have ended since the last call, and fit the model to all losses.

        Losses of 0 and maps without a target teach the model nothing and are left out.
        """
        self._under_way.clear()
        drawn = self.space.distributions().keys()
        for trial in study.get_trials(deepcopy=False):
            if trial.state == TrialState.RUNNING and trial.params.keys() == drawn:
                self._under_way.add(self.space.decode(trial.params))
            elif trial.number not in self._results:
                result = result_of(trial)
                if result is not None and result.status != "failed":
                    self._results[trial.number] = result
        losses = _losses(list(self._results.values()))
        seen = [known for known in losses if known[0].targets and known[1] > 0]
        if seen:
            self.model.fit(*zip(*seen, strict=True))

    @property
    def identity(self) -> SharingMap:
        """The map of the full cache."""
        return SharingMap.identity(self.space.ranking.num_layers)

    @property
    def known(self) -> set[SharingMap]:
        """The maps that were scored, or that are drawn and will be scored."""
        return {result.sharing_map for result in self._results.values()} | self._under_way

    def counts(self) -> Counter[int]:
        """How many maps of each size (number of shared layers) were tried so far."""
        return Counter(len(sharing_map.targets) for sharing_map in self.known)

    def untried(self) -> set[int]:
        """The targets that no map has tried as its only target.

        Seeds do not count, because they choose a source by other rules than what it costs.
        """
        drawn = self._under_way | {
            result.sharing_map for result in self._results.values() if result.origin == SAMPLED
        }
        targets = {target for target, _ in self.model.pairs}
        return targets - {m.targets[0] for m in drawn if len(m.targets) == 1}

    def best(self, each: int) -> dict[int, list[SharingMap]]:
        """The ``each`` best complete maps of every size, best first. Size 0 has the full cache."""
        ranked = by_size(self._results.values())
        maps = {
            size: dict.fromkeys(r.sharing_map for r in each_of) for size, each_of in ranked.items()
        }
        return {0: [self.identity], **{size: list(found)[:each] for size, found in maps.items()}}

    def lowest(self) -> dict[int, float]:
        """The least loss of the complete maps of every size; the model predicts such losses."""
        ranked = by_size(self._results.values())
        return {
            size: min(result.scores.get(FIT, -(result.score or 0.0)) for result in results)
            for size, results in ranked.items()
        }

    def ranked(self, maps: Iterable[SharingMap], costs: np.ndarray) -> list[SharingMap]:
        """Order ``maps`` by the loss expected if pairs lose ``costs``; the least comes first."""
        listed = sorted(set(maps), key=lambda sharing_map: sharing_map.kv_source_layers)
        if not listed:
            return []
        order = np.argsort(self.model.expected(listed, costs), kind="stable")
        return [listed[index] for index in order]


def _losses(results: Sequence[TrialResult]) -> list[tuple[SharingMap, float, float]]:
    """Every map with its loss on all windows, and the standard deviation of the log of that loss.

    The loss of a complete map is measured, so the deviation is 0. The loss of a map that was
    screened out is estimated. It is the loss in the last stage that the map saw, times the ratio of
    the two losses that other maps had (the geometric mean). The deviation is that of the log ratio
    among these maps.
    """
    ratios: dict[str, tuple[float, float]] = {}

    def ratio(stage: str) -> tuple[float, float]:
        if stage not in ratios:
            both = [(r.scores.get(stage), r.scores.get(FIT)) for r in results]
            logs = [math.log(fit / cheap) for cheap, fit in both if fit and cheap]
            doubt = stdev(logs) if len(logs) > 1 else 0.0
            ratios[stage] = math.exp(fmean(logs)) if logs else 1.0, doubt
        return ratios[stage]

    def loss(result: TrialResult) -> tuple[float, float]:
        if FIT in result.scores:
            return result.scores[FIT], 0.0
        seen = screens(result.scores)
        if not seen:
            return -(result.score or 0.0), 0.0
        factor, doubt = ratio(seen[-1])
        return factor * result.scores[seen[-1]], doubt

    return [(result.sharing_map, *loss(result)) for result in results]
