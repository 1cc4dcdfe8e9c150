"""The search space ``ranked_pairs``: accept bits along the ranking.

The paper's greedy strategy walks in this space. `registry.make_space` makes the space for
``search_space=ranked_pairs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from kvsharer_exp.search.spaces.base import Space, or_first_pair, refuse_a_single_map
from kvsharer_exp.values.errors import at_least
from kvsharer_exp.values.sharing_map import SharingMap


@dataclass(frozen=True)
class RankedPairs(Space):
    """Pairs have accept bits, which are read along the ranking as the paper's greedy walks it.

    ``accept_T_S`` says whether layer T reads layer S when the walk comes to that pair. The walk
    stops at ``num_shared`` targets. When no bit is set, the ranking's first pair is shared.

    The ranking decides which pairs have a bit: its first ``num_pairs``, and those of the seeds. It
    is also the order of the walk, so it decides which pairs win when more than ``num_shared`` bits
    are set.

    Args:
        num_pairs: number of pairs from the dissimilar end that have a bit, >= 1.
    """

    num_pairs: int = 64

    def __post_init__(self) -> None:
        at_least("search_space.options.num_pairs", self.num_pairs, 1)

    def check(self) -> None:
        if len(self.pairs) == 1:
            full = SharingMap.identity(self.ranking.num_layers)
            refuse_a_single_map("ranked_pairs", [full.share(*self.pairs[0])])

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The (target, source) pairs that have a bit, in the order of the ranking."""
        wanted = {(p.target, p.source) for p in self.ranking.pairs[: self.num_pairs]}
        for seed in self.setting.seeds:
            wanted |= {(target, seed.kv_source_layers[target]) for target in seed.targets}
        return tuple(pair for pair in self.setting.places if pair in wanted)

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
        return or_first_pair(sharing_map, self.ranking)

    def encode(self, sharing_map: SharingMap) -> dict[str, Any] | None:
        chosen = {(target, sharing_map.kv_source_layers[target]) for target in sharing_map.targets}
        if not 0 < len(chosen) <= self.max_shared or not chosen <= set(self.pairs):
            return None
        return {
            "num_shared": len(chosen),
            **{_bit(*pair): pair in chosen for pair in self.pairs},
        }


def _bit(target: int, source: int) -> str:
    return f"accept_{target}_{source}"
