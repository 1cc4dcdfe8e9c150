"""What a search space must do, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from optuna.distributions import BaseDistribution

from kvsharer_exp.search.paper.greedy import Advance
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.ranking import DissimilarityRanking
from kvsharer_exp.values.sharing_map import SharingMap


@runtime_checkable
class SearchSpace(Protocol):
    """What the coordinator and the samplers need of a space."""

    @property
    def ranking(self) -> DissimilarityRanking:
        """Every pair that may share."""

    @property
    def max_shared(self) -> int:
        """The most targets a decoded map has."""

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distribution of every parameter, by name."""

    def decode(self, params: Mapping[str, Any]) -> SharingMap:
        """A valid map with 1 to ``max_shared`` targets, for any parameters drawn.

        Never the full cache: it is scored anyway, and a trial spent on it would teach nothing.
        """

    def encode(self, sharing_map: SharingMap) -> dict[str, Any] | None:
        """Parameters that decode to ``sharing_map``; None when this space does not hold it."""


@dataclass(frozen=True)
class SpaceSetting:
    """What a space may need to know; most need the ranking only.

    Args:
        ranking: every pair that may share, most dissimilar first.
        max_shared: the most targets a map may have, >= 1.
        seeds: maps that will be tried first; a space holds them where it can.
        rank: the ranking by a distance (a name in `ranking.DISTANCES`) and a weight of keys
            against values in [0, 1]; None: ``ranking`` is the only one.
        advance: `Evaluator.advance`, the acceptance test; None: every pair passes.
        reset: `Evaluator.reset`, called around whatever used ``advance``.
    """

    ranking: DissimilarityRanking
    max_shared: int
    seeds: tuple[SharingMap, ...] = ()
    rank: Callable[[str, float], DissimilarityRanking] | None = None
    advance: Advance | None = None
    reset: Callable[[], None] = lambda: None

    @property
    def num_layers(self) -> int:
        return self.ranking.num_layers

    @cached_property
    def sources(self) -> dict[int, tuple[int, ...]]:
        """What each layer that may be a target may read, most dissimilar first; by target."""
        found: dict[int, list[int]] = {}
        for pair in self.ranking.pairs:
            found.setdefault(pair.target, []).append(pair.source)
        return {target: tuple(found[target]) for target in sorted(found)}

    @cached_property
    def places(self) -> dict[tuple[int, int], int]:
        """The place of every (target, source) in the ranking, 0 for the most dissimilar."""
        return {(pair.target, pair.source): i for i, pair in enumerate(self.ranking.pairs)}


@dataclass(frozen=True)
class Space:
    """Holds the setting; what else a space needs is in `SearchSpace`."""

    setting: SpaceSetting

    @property
    def ranking(self) -> DissimilarityRanking:
        return self.setting.ranking

    @property
    def max_shared(self) -> int:
        return self.setting.max_shared

    def check(self) -> None:
        """Refuse a setting that leaves nothing to search; options are refused as it is made.

        Raises:
            InputError: see `refuse_a_single_map`.
        """


def or_first_pair(sharing_map: SharingMap, ranking: DissimilarityRanking) -> SharingMap:
    """The map itself, or where it is the full cache the ranking's first pair shared."""
    first = ranking.pairs[0]
    return sharing_map if sharing_map.targets else sharing_map.share(first.target, first.source)


def from_pairs(num_layers: int, pairs: Iterable[tuple[int, int]]) -> SharingMap:
    """The map in which every ``(target, source)`` holds; sources must own their KV."""
    sources = list(range(num_layers))
    for target, source in pairs:
        sources[target] = source
    return SharingMap(tuple(sources))


def refuse_a_single_map(kind: str, maps: Iterable[SharingMap]) -> None:
    """Refuse a space that holds nothing to search.

    Raises:
        InputError: all of ``maps`` (at least one) are the same.
    """
    every = iter(maps)
    first = next(every)
    if all(sharing_map == first for sharing_map in every):
        reads = [f"{target} reads {first.kv_source_layers[target]}" for target in first.targets]
        raise InputError(
            f"search_space {kind} holds one map only (layer {', '.join(reads[:3])}): "
            "raise compression.ratios, change search_space, or score it with kvsharer evaluate"
        )
