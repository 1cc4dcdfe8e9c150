"""What a search space must provide, and the setting that a space is made from.

A search space turns the parameters that an Optuna sampler draws into a sharing map or a KV plan,
and that back into parameters. `registry.make_space` makes the space of a sweep; the coordinator
(`coordinator.run_search`) and the samplers use the space through `SearchSpace`.

A space usually subclasses `Space`, which holds the ranking and the rest of the `SpaceSetting`. The
functions below help to write one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol, runtime_checkable

from optuna.distributions import BaseDistribution

from kvsharer_exp.search.candidates import Candidate
from kvsharer_exp.search.paper.greedy import Advance
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.ranking import DissimilarityRanking
from kvsharer_exp.values.sharing_map import SharingMap


@runtime_checkable
class SearchSpace(Protocol):
    """The members of a search space that the coordinator and the samplers use."""

    @property
    def ranking(self) -> DissimilarityRanking:
        """Every pair of layers that may share, most dissimilar first."""

    @property
    def max_shared(self) -> int:
        """The most targets that a decoded map can have."""

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distribution of every parameter, by the name of the parameter."""

    def decode(self, params: Mapping[str, Any]) -> SharingMap | KVPlan:
        """The sharing map of ``params``: a valid map with 1 to ``max_shared`` targets.

        Any parameters that can be drawn give such a map. The map is never the full cache: that is
        scored anyway, and a trial spent on it would teach nothing. A space of plans gives a plan.
        """

    def encode(self, sharing_map: Any) -> dict[str, Any] | None:
        """Parameters that decode to ``sharing_map``; None when this space does not hold the map."""


@dataclass(frozen=True)
class SpaceSetting:
    """What a search space may need to know. Most spaces need only the ranking.

    Args:
        ranking: every pair of layers that may share, most dissimilar first.
        max_shared: the most targets that a map may have, >= 1.
        seeds: maps that the search tries first; a space should hold them where it can.
        rank: makes the ranking for a distance (a name in `ranking.DISTANCES`) and a weight of
            keys against values in [0, 1]; None when ``ranking`` is the only one.
        advance: `Evaluator.advance`, the acceptance test; None when every pair passes.
        reset: `Evaluator.reset`; a space calls it before and after it uses ``advance``.
        candidates: what a plan may do at each layer; none for a space of maps.
        budgets: the shares of the full cache's bytes that are asked for; none for a space of maps.
    """

    ranking: DissimilarityRanking
    max_shared: int
    seeds: tuple[SharingMap, ...] = ()
    rank: Callable[[str, float], DissimilarityRanking] | None = None
    advance: Advance | None = None
    reset: Callable[[], object] = lambda: None
    candidates: tuple[Candidate, ...] = ()
    budgets: tuple[float, ...] = ()

    @property
    def num_layers(self) -> int:
        return self.ranking.num_layers

    @cached_property
    def sources(self) -> dict[int, tuple[int, ...]]:
        """For each layer that may be a target, the layers it may read, most dissimilar first."""
        found: dict[int, list[int]] = {}
        for pair in self.ranking.pairs:
            found.setdefault(pair.target, []).append(pair.source)
        return {target: tuple(found[target]) for target in sorted(found)}

    @cached_property
    def places(self) -> dict[tuple[int, int], int]:
        """The place of every (target, source) pair in the ranking, 0 for the most dissimilar."""
        return {(pair.target, pair.source): i for i, pair in enumerate(self.ranking.pairs)}


@dataclass(frozen=True)
class Space:
    """A base class that holds the setting. `SearchSpace` lists what else a space needs."""

    setting: SpaceSetting
    holds_plans: ClassVar[bool] = False

    @property
    def ranking(self) -> DissimilarityRanking:
        return self.setting.ranking

    @property
    def max_shared(self) -> int:
        return self.setting.max_shared

    def check(self) -> None:
        """Refuse a setting that leaves nothing to search.

        This base class accepts every setting. A wrong option is refused earlier, when the space is
        made.

        Raises:
            InputError: the space holds a single map, see `refuse_a_single_map`.
        """


def holds_plans(space: SearchSpace) -> bool:
    """Whether ``space`` decodes to plans (`KVPlan`), and not to sharing maps only."""
    return bool(getattr(space, "holds_plans", False))


def encoded(space: SearchSpace, plan: KVPlan) -> dict[str, Any] | None:
    """Parameters of ``space`` that decode to ``plan``; None when it does not hold the plan."""
    if holds_plans(space):
        return space.encode(plan)
    return None if plan.sharing_map is None else space.encode(plan.sharing_map)


def or_first_pair(sharing_map: SharingMap, ranking: DissimilarityRanking) -> SharingMap:
    """Return ``sharing_map``; if it has no targets, share the ranking's first pair instead."""
    first = ranking.pairs[0]
    return sharing_map if sharing_map.targets else sharing_map.share(first.target, first.source)


def from_pairs(num_layers: int, pairs: Iterable[tuple[int, int]]) -> SharingMap:
    """Make the map in which every target of ``pairs``, ``(target, source)``, reads its source.

    Raises:
        SharingMapError: a source does not own its KV, or comes after its target.
    """
    sources = list(range(num_layers))
    for target, source in pairs:
        sources[target] = source
    return SharingMap(tuple(sources))


def refuse_a_single_map(kind: str, maps: Iterable[SharingMap]) -> None:
    """Refuse the search space ``kind`` if the ``maps`` that it holds are all the same.

    Raises:
        InputError: they are, so there is nothing to search; ``maps`` must hold at least one map.
    """
    every = iter(maps)
    first = next(every)
    if all(sharing_map == first for sharing_map in every):
        reads = [f"{target} reads {first.kv_source_layers[target]}" for target in first.targets]
        raise InputError(
            f"search_space {kind} holds one map only (layer {', '.join(reads[:3])}): "
            "raise compression.ratios, change search_space, or score it with kvsharer evaluate"
        )
