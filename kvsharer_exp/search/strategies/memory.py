"""What our samplers remember of a study: its results, its best maps, and what each pair loses.

`MapSampler` updates a `Memory` before each draw, and the strategies read it. Other packages may use
it for strategies of their own (`kvsharer_exp.extend`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
from optuna.trial import TrialState

from kvsharer_exp.search.front import by_rung, bytes_rung, num_shared
from kvsharer_exp.search.outcome import FIT, screens
from kvsharer_exp.search.spaces.base import SearchSpace, holds_plans
from kvsharer_exp.search.spaces.layer_actions import LayerActions
from kvsharer_exp.search.strategies.loss_model import LossModel, pair_terms
from kvsharer_exp.search.strategies.plan_terms import action_terms
from kvsharer_exp.search.study_store import KeptStudy, result_of
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import SAMPLED, TrialResult


class Memory:
    """Remembers the trials of a study; what it knows is read from them, also in a resumed study.

    In a space of maps it holds maps (`SharingMap`) and keeps the best of every number of shared
    layers. In a space of plans it holds plans (`KVPlan`) and keeps the best of every rung of bytes.

    ``errors``: the block errors of the pairs, known before the first trial (see `LossModel`). The
    attribute ``model`` is the `LossModel`, and ``space`` the search space.
    """

    def __init__(self, space: SearchSpace, errors: Sequence[Sequence[float]] | None = None) -> None:
        self.space, self._plans = space, holds_plans(space)
        if isinstance(space, LayerActions):
            self.model = LossModel(action_terms(space.at))
        else:
            self.model = LossModel(pair_terms(space.ranking, errors))
        self._rung = bytes_rung if self._plans else num_shared
        self._seen: set[int] = set()  # trials that have ended
        self._results: dict[int, TrialResult] = {}  # by their own number, in the stored study
        self._held: dict[int, Any] = {}  # the map or plan of each of these results
        self._under_way: set[Any] = set()

    def update(self, study: KeptStudy) -> None:
        """Take in the trials that have ended since the last call, and fit the model to all losses.

        Losses of 0 and the full cache teach the model nothing and are left out.
        """
        self._under_way.clear()
        drawn = self.space.distributions().keys()
        for trial in study.get_trials(deepcopy=False):
            if trial.state == TrialState.RUNNING and trial.params.keys() == drawn:
                self._under_way.add(self.space.decode(trial.params))
            elif trial.number not in self._seen and trial.state.is_finished():
                self._seen.add(trial.number)
                result = result_of(trial)
                if result is not None and result.status != "failed":
                    self._results[result.number] = result
                    self._held[result.number] = result.plan if self._plans else result.sharing_map
        losses = _losses(list(self._results.values()))
        seen = [
            (held, *known)
            for held, known in zip(self._held.values(), losses, strict=True)
            if self.model.terms.of(held) and known[0] > 0
        ]
        if seen:
            self.model.fit(*zip(*seen, strict=True))

    @property
    def identity(self) -> SharingMap:
        """The map of the full cache."""
        return SharingMap.identity(self.space.ranking.num_layers)

    @property
    def known(self) -> set[Any]:
        """The maps or plans that were scored, or that are drawn and will be scored."""
        return set(self._held.values()) | self._under_way

    def counts(self) -> Counter[int]:
        """How many maps of each size (number of shared layers) were tried so far."""
        return Counter(len(sharing_map.targets) for sharing_map in self.known)

    def untried(self) -> set[int]:
        """The targets that no map has tried as its only target.

        Seeds do not count, because they choose a source by other rules than what it costs.
        """
        drawn = self._under_way | {
            self._held[number]
            for number, result in self._results.items()
            if result.origin == SAMPLED
        }
        targets = {target for target, _ in self.model.terms.keys}
        return targets - {m.targets[0] for m in drawn if len(m.targets) == 1}

    def best(self, each: int) -> dict[int, list[Any]]:
        """The ``each`` best complete maps or plans of every size or rung, best first.

        Of maps, size 0 has the full cache.
        """
        ranked = by_rung(self._results.values(), self._rung)
        held = {
            rung: list(dict.fromkeys(self._held[r.number] for r in each_of))[:each]
            for rung, each_of in ranked.items()
        }
        return held if self._plans else {0: [self.identity], **held}

    def lowest(self) -> dict[int, float]:
        """The least loss of the complete maps or plans of every size or rung.

        The model predicts such losses.
        """
        ranked = by_rung(self._results.values(), self._rung)
        return {
            rung: min(result.scores.get(FIT, -(result.score or 0.0)) for result in results)
            for rung, results in ranked.items()
        }

    def ranked(self, held: Iterable[Any], costs: np.ndarray) -> list[Any]:
        """Order maps or plans by the loss expected if terms lose ``costs``; the least first."""
        listed = sorted(set(held), key=str if self._plans else _sources_of)
        if not listed:
            return []
        order = np.argsort(self.model.expected(listed, costs), kind="stable")
        return [listed[index] for index in order]


def _sources_of(sharing_map: SharingMap) -> tuple[int, ...]:
    return sharing_map.kv_source_layers


def _losses(results: Sequence[TrialResult]) -> list[tuple[float, float]]:
    """The loss of every result on all windows, and the standard deviation of its log.

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

    return [loss(result) for result in results]
