"""Search spaces: parameters Optuna can draw, decoded to a valid map by repair, never rejected.

A space is a class here and a YAML in `search_spaces/`. `decode` turns any parameters into a map;
`encode` gives parameters that decode to a known map, so that seeds can be enqueued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from kvsharer_exp.errors import InputError
from kvsharer_exp.records import DissimilarityRanking
from kvsharer_exp.sharing_map import SharingMap


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
        """A valid map with at most ``max_shared`` targets, for any parameters drawn."""

    def encode(self, sharing_map: SharingMap) -> dict[str, Any] | None:
        """Parameters that decode to ``sharing_map``; None when this space does not hold it."""


@dataclass(frozen=True)
class RankedPairs:
    """Accept bits along the ranking, as the paper's greedy walks it.

    ``accept_T_S`` says whether layer T reads layer S when the walk comes to that pair; the walk
    stops at ``num_shared`` targets. Pairs: the first ``num_pairs`` of the ranking and those of
    the seeds, in ranking order.
    """

    ranking: DissimilarityRanking
    max_shared: int
    seeds: Sequence[SharingMap] = ()
    num_pairs: int = 64

    def __post_init__(self) -> None:
        wanted = {(p.target, p.source) for p in self.ranking.pairs[: self.num_pairs]}
        for seed in self.seeds:
            wanted |= {(target, seed.kv_source_layers[target]) for target in seed.targets}
        pairs = [(p.target, p.source) for p in self.ranking.pairs if (p.target, p.source) in wanted]
        object.__setattr__(self, "pairs", tuple(pairs))

    pairs: tuple[tuple[int, int], ...] = ()

    def distributions(self) -> dict[str, BaseDistribution]:
        bits = {_bit(*pair): CategoricalDistribution((False, True)) for pair in self.pairs}
        return {"num_shared": IntDistribution(1, self.max_shared), **bits}

    def decode(self, params: Mapping[str, Any]) -> SharingMap:
        sharing_map = SharingMap.identity(self.ranking.num_layers)
        for target, source in self.pairs:
            if len(sharing_map.targets) == params["num_shared"]:
                break
            if params[_bit(target, source)] and target not in sharing_map.targets:
                sharing_map = sharing_map.share(target, source)
        return sharing_map

    def encode(self, sharing_map: SharingMap) -> dict[str, Any] | None:
        chosen = {(target, sharing_map.kv_source_layers[target]) for target in sharing_map.targets}
        if not 0 < len(chosen) <= self.max_shared or not chosen <= set(self.pairs):
            return None
        return {
            "num_shared": len(chosen),
            **{_bit(*pair): pair in chosen for pair in self.pairs},
        }


@dataclass(frozen=True)
class LayerSources:
    """A wanted source per layer; the ``num_shared`` wishes that the ranking puts first come true.

    ``source_T`` is the layer that T would read, or T itself to keep its own KV.
    """

    ranking: DissimilarityRanking
    max_shared: int
    seeds: Sequence[SharingMap] = ()

    def _choices(self) -> dict[int, tuple[int, ...]]:
        allowed: dict[int, list[int]] = {}
        for pair in self.ranking.pairs:
            allowed.setdefault(pair.target, []).append(pair.source)
        return {target: (target, *sorted(allowed[target])) for target in sorted(allowed)}

    def distributions(self) -> dict[str, BaseDistribution]:
        sources = {
            f"source_{target}": CategoricalDistribution(choices)
            for target, choices in self._choices().items()
        }
        return {"num_shared": IntDistribution(1, self.max_shared), **sources}

    def decode(self, params: Mapping[str, Any]) -> SharingMap:
        sharing_map = SharingMap.identity(self.ranking.num_layers)
        for pair in self.ranking.pairs:
            if len(sharing_map.targets) == params["num_shared"]:
                break
            if params[f"source_{pair.target}"] == pair.source:
                sharing_map = sharing_map.share(pair.target, pair.source)
        return sharing_map

    def encode(self, sharing_map: SharingMap) -> dict[str, Any] | None:
        choices = self._choices()
        sources = sharing_map.kv_source_layers
        if not 0 < len(sharing_map.targets) <= self.max_shared:
            return None
        if any(sources[target] not in choices.get(target, ()) for target in sharing_map.targets):
            return None
        return {
            "num_shared": len(sharing_map.targets),
            **{f"source_{target}": sources[target] for target in choices},
        }


def _bit(target: int, source: int) -> str:
    return f"accept_{target}_{source}"


SPACES: dict[str, Callable[..., SearchSpace]] = {
    "ranked_pairs": RankedPairs,
    "layer_sources": LayerSources,
}


def make_space(
    kind: str,
    ranking: DissimilarityRanking,
    *,
    max_shared: int,
    seeds: Sequence[SharingMap] = (),
    **options: Any,
) -> SearchSpace:
    """The space ``kind`` for this ranking.

    Raises:
        InputError: no such space, an unknown option, or fewer pairs than ``max_shared`` needs.
    """
    if kind not in SPACES:
        raise InputError(f"search_space.kind={kind} is unknown: choose one of {', '.join(SPACES)}")
    targets = {pair.target for pair in ranking.pairs}
    if len(targets) < max_shared:
        raise InputError(
            f"{max_shared} shared layers asked, but only {len(targets)} layers of this model may "
            "read another: lower compression.ratios"
        )
    try:
        return SPACES[kind](ranking, max_shared=max_shared, seeds=tuple(seeds), **options)
    except TypeError as error:
        raise InputError(f"search_space {kind} does not take these options: {error}") from error
