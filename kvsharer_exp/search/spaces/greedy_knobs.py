"""The search space ``greedy_knobs``: the paper's greedy strategy with its knobs as parameters.

`registry.make_space` makes it for ``search_space=greedy_knobs``. It answers what the paper's method
could reach with other settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from kvsharer_exp.measure.ranking import DISTANCES
from kvsharer_exp.search.paper.greedy import greedy, ordered_pairs
from kvsharer_exp.search.spaces.base import Space
from kvsharer_exp.values.errors import InputError, at_least, did_you_mean
from kvsharer_exp.values.ranking import DissimilarityRanking
from kvsharer_exp.values.scores import Accept, CandidateScores
from kvsharer_exp.values.sharing_map import SharingMap

ORDERS = ("dissimilar", "similar")
_PAPER = {"key_weight": 0.5, "threshold": 0.5}


@dataclass(frozen=True)
class _Memory:
    rankings: dict[tuple[str, float], DissimilarityRanking] = field(default_factory=dict)
    scores: dict[SharingMap, tuple[CandidateScores, int]] = field(default_factory=dict)
    walks: dict[tuple[tuple[str, Any], ...], list[SharingMap]] = field(default_factory=dict)
    params: dict[SharingMap, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class GreedyKnobs(Space):
    """A map is where a walk of the paper's greedy strategy stood at ``num_shared`` targets.

    ``order`` says whether the walk starts at the ``dissimilar`` or the ``similar`` end of the
    ranking. ``distance`` and ``key_weight`` (keys against values, 0 to 1 in steps of 0.25) say what
    pairs are ranked by; they are drawn when the setting can rank. ``threshold`` is the T of the
    acceptance test, 0.3 to 0.95 in steps of 0.05; it is drawn when there is a test. A walk that
    finds fewer than ``num_shared`` pairs gives those it found. A walk that finds none gives the
    pair that came nearest to T.

    The ranking is all there is to this space: every map comes from a walk along one. The knobs lie
    on a grid, and every walk is done once for all values of ``num_shared``, so the grid bounds what
    is kept. Scores are kept too: a later walk scores a candidate again only where its known scores
    do not decide. A walk not met before costs as much as scoring its candidates. The space holds
    the maps of the walks done so far and, from both ends, those of the paper's own walk (T = 0.5,
    keys and values alike).

    Args:
        distances: the distances to draw from, names in `ranking.DISTANCES`.
        tries: a walk gives up after ``tries × max_shared`` pairs (the paper tries all); >= 1.
    """

    distances: Sequence[str] = tuple(DISTANCES)
    tries: int = 3
    _memory: _Memory = field(default_factory=_Memory, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        at_least("search_space.options.tries", self.tries, 1)
        if isinstance(self.distances, str) or not self.distances:
            raise InputError(
                f"search_space.options.distances={self.distances} is no list of distances: "
                f"give some of [{','.join(DISTANCES)}]"
            )
        for name in self.distances:
            if name not in DISTANCES:
                hint = did_you_mean(name, tuple(DISTANCES))
                raise InputError(f"search_space.options.distances={name} is unknown: {hint}")

    def distributions(self) -> dict[str, BaseDistribution]:
        return {"num_shared": IntDistribution(1, self.max_shared), **self._knobs()}

    def decode(self, params: Mapping[str, Any]) -> SharingMap:
        num_shared: int = params["num_shared"]
        return self._walk({name: params[name] for name in self._knobs()})[num_shared - 1]

    def encode(self, sharing_map: SharingMap) -> dict[str, Any] | None:
        distance = self.ranking.distance
        if distance not in self.distances:
            distance = self.distances[0]
        for order in ORDERS:
            paper = {**_PAPER, "order": order, "distance": distance}
            self._walk({name: paper[name] for name in self._knobs()})
        params = self._memory.params.get(sharing_map)
        return None if params is None else dict(params)

    def _knobs(self) -> dict[str, BaseDistribution]:
        knobs: dict[str, BaseDistribution] = {"order": CategoricalDistribution(ORDERS)}
        if self.setting.rank is not None:
            knobs["distance"] = CategoricalDistribution(tuple(self.distances))
            knobs["key_weight"] = FloatDistribution(0, 1, step=0.25)
        if self.setting.advance is not None:
            knobs["threshold"] = FloatDistribution(0.3, 0.95, step=0.05)
        return knobs

    def _walk(self, knobs: Mapping[str, Any]) -> list[SharingMap]:
        """The maps of one walk, for 1, 2, … ``max_shared`` targets."""
        # In floating point 0.3 + 3 x 0.05 is not 0.45. Rounding gives each grid point one name.
        knobs = {k: round(v, 2) if isinstance(v, float) else v for k, v in knobs.items()}
        key = tuple(knobs.items())
        if key not in self._memory.walks:
            self._memory.walks[key] = maps = self._run(knobs)
            for sharing_map in maps:
                params = {"num_shared": len(sharing_map.targets), **knobs}
                self._memory.params.setdefault(sharing_map, params)
        return self._memory.walks[key]

    def _run(self, knobs: Mapping[str, Any]) -> list[SharingMap]:
        layers = self.ranking.num_layers
        self.setting.reset()
        try:
            found = greedy(
                ordered_pairs(self._ranking(knobs), knobs["order"]),
                layers,
                [count / layers for count in range(1, self.max_shared + 1)],
                advance=None if self.setting.advance is None else self._advance,
                threshold=knobs.get("threshold", 0.0),
                max_candidates=self.tries * self.max_shared,
            )
        finally:
            self.setting.reset()
        if found[0].found:
            return [SharingMap(result.kv_source_layers) for result in found]
        nearest = max(found[0].trace, key=lambda step: step.cosine or 0.0)
        return [SharingMap.identity(layers).share(nearest.target, nearest.source)] * len(found)

    def _advance(self, sharing_map: SharingMap, accept: Accept) -> tuple[CandidateScores, bool]:
        """Call `Evaluator.advance`, unless scores known from another walk decide here too."""
        assert self.setting.advance is not None
        known = self._memory.scores.get(sharing_map)
        accepted = None if known is None else accept(*known)
        if known is not None and accepted is not None:
            return known[0], accepted

        def remember(scores: CandidateScores, left: int) -> bool | None:
            self._memory.scores[sharing_map] = scores, left
            return accept(scores, left)

        return self.setting.advance(sharing_map, remember)

    def _ranking(self, knobs: Mapping[str, Any]) -> DissimilarityRanking:
        if self.setting.rank is None:
            return self.ranking
        key = (knobs["distance"], knobs["key_weight"])
        if key not in self._memory.rankings:
            self._memory.rankings[key] = self.setting.rank(*key)
        return self._memory.rankings[key]
