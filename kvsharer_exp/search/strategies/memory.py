"""What our samplers remember of a study: its results, its best maps, and what each pair loses.

`MapSampler` updates a `Memory` before each draw, and the strategies read it. Other packages may use
it for strategies of their own (`kvsharer_exp.extend`).
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from statistics import fmean, stdev
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

from kvsharer_exp.search.front import bytes_rung, is_comparable, num_shared, score_of
from kvsharer_exp.search.outcome import FIT, screens
from kvsharer_exp.search.spaces.base import SearchSpace, holds_plans
from kvsharer_exp.search.spaces.layer_actions import LayerActions
from kvsharer_exp.search.stored_trial import result_of
from kvsharer_exp.search.strategies.loss_model import LossModel, pair_terms
from kvsharer_exp.search.strategies.plan_terms import action_terms
from kvsharer_exp.search.study_store import KeptStudy
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import SAMPLED, TrialResult

# The model learns from so many of the latest results, and from as many of those before. It learns
# anew when so small a part of the results is new.
_TAUGHT, _REFITS = 1000, 50


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
        self._rung: Callable[[TrialResult], int] = bytes_rung if self._plans else num_shared
        if isinstance(space, LayerActions):
            self._rung = space.steps
        # Trials before this one have ended, but for the open ones; of those it says what is known.
        self._next, self._open = 0, dict[int, bool]()
        self._results: list[TrialResult] = []  # as they ended
        self._held: list[Any] = []  # the map or plan of each of these results
        self._best: dict[int, list[tuple[float, int]]] = {}  # by rung: minus score, and which one
        self._lowest: dict[int, float] = {}
        self._known: set[Any] = set()
        self._counts: Counter[int] = Counter()
        self._taught = 0

    def update(self, study: optuna.Study | KeptStudy) -> None:
        """Take in the trials that have ended since the last call, and fit the model to the losses.

        Losses of 0 and the full cache teach the model nothing and are left out. What the model
        knows depends on the results only, and not on when it was asked.
        """
        trials = study.get_trials(deepcopy=False)
        looked_at = [*sorted(self._open), *range(self._next, len(trials))]
        self._next = len(trials)
        drawn = self.space.distributions().keys()
        ended: list[TrialResult] = []
        for number in looked_at:
            trial = trials[number]
            if trial.state.is_finished():
                self._open.pop(number, None)
                result = result_of(trial)
                if result is not None and result.status != "failed":
                    ended.append(result)
            elif not self._open.setdefault(number, False):
                if trial.state == TrialState.RUNNING and trial.params.keys() == drawn:
                    self._open[number] = True
                    self._know(self.space.decode(trial.params))
        for result in sorted(ended, key=lambda result: result.number):
            self._take(result)
        count = len(self._results)
        taught = count - count % max(1, count // _REFITS)
        if taught != self._taught:
            self._taught = taught
            self._teach(taught)

    def _take(self, result: TrialResult) -> None:
        held = result.plan if self._plans else result.sharing_map
        place = len(self._results)
        self._results.append(result)
        self._held.append(held)
        self._know(held)
        if is_comparable(result):
            rung = self._rung(result)
            insort(self._best.setdefault(rung, []), (-score_of(result), place))
            loss = result.scores.get(FIT, -score_of(result))
            self._lowest[rung] = min(loss, self._lowest.get(rung, loss))

    def _know(self, held: Any) -> None:
        if held not in self._known:
            self._known.add(held)
            self._counts[len(held.targets)] += 1

    def _teach(self, count: int) -> None:
        """Fit the model to the first ``count`` results: the latest of them, and some of the others.

        All others would cost more than they teach.
        """
        older = max(0, count - _TAUGHT)
        step = max(1, -(-older // _TAUGHT))
        places = [*range(0, older, step), *range(older, count)]
        losses = _losses([self._results[place] for place in places])
        seen = [
            (self._held[place], *known)
            for place, known in zip(places, losses, strict=True)
            if known[0] > 0 and self.model.terms.of(self._held[place])
        ]
        if seen:
            self.model.fit(*zip(*seen, strict=True))

    @property
    def identity(self) -> SharingMap:
        """The map of the full cache."""
        return SharingMap.identity(self.space.ranking.num_layers)

    @property
    def known(self) -> Set[Any]:
        """The maps or plans that were scored, or that are drawn and will be scored."""
        return self._known

    @property
    def under_way(self) -> int:
        """How many trials are open, those included of which nothing is known yet."""
        return len(self._open)

    def counts(self) -> Counter[int]:
        """How many maps of each size (number of shared layers) were tried so far."""
        return self._counts

    def untried(self) -> set[int]:
        """The targets that no map has tried as its only target.

        Seeds do not count, because they choose a source by other rules than what it costs.
        """
        seeds = {
            held
            for held, result in zip(self._held, self._results, strict=True)
            if result.origin != SAMPLED
        }
        targets = {target for target, _ in self.model.terms.keys}
        drawn = (m for m in self._known if len(m.targets) == 1 and m not in seeds)
        return targets - {m.targets[0] for m in drawn}

    def best(self, each: int) -> dict[int, list[Any]]:
        """The ``each`` best complete maps or plans of every size or rung, best first.

        Of maps, size 0 has the full cache.
        """
        held = {
            rung: [self._held[place] for _, place in self._best[rung][:each]]
            for rung in sorted(self._best)
        }
        return held if self._plans else {0: [self.identity], **held}

    def lowest(self) -> dict[int, float]:
        """The least loss of the complete maps or plans of every size or rung.

        The model predicts such losses.
        """
        return {rung: self._lowest[rung] for rung in sorted(self._lowest)}

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
