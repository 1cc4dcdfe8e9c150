"""The search space ``layer_sources``: a wanted source for every layer. It holds every map.

`registry.make_space` makes it for ``search_space=layer_sources``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from kvsharer_exp.search.spaces.base import Space, or_first_pair
from kvsharer_exp.values.sharing_map import SharingMap


@dataclass(frozen=True)
class LayerSources(Space):
    """Every layer wishes for a source; the first ``num_shared`` wishes by ranking are granted.

    ``source_T`` is the layer that layer T would read, or T itself when T keeps its own KV. If no
    layer wishes to read another one, the ranking's first pair is shared.

    The ranking is the order in which wishes are granted.
    """

    @cached_property
    def choices(self) -> dict[int, tuple[int, ...]]:
        """The layers that each layer may wish to read, itself first."""
        return {
            target: (target, *sorted(allowed)) for target, allowed in self.setting.sources.items()
        }

    def distributions(self) -> dict[str, BaseDistribution]:
        sources = {
            f"source_{target}": CategoricalDistribution(choices)
            for target, choices in self.choices.items()
        }
        return {"num_shared": IntDistribution(1, self.max_shared), **sources}

    def decode(self, params: Mapping[str, Any]) -> SharingMap:
        sharing_map = SharingMap.identity(self.ranking.num_layers)
        for pair in self.ranking.pairs:
            if len(sharing_map.targets) == params["num_shared"]:
                break
            if params[f"source_{pair.target}"] == pair.source:
                sharing_map = sharing_map.share(pair.target, pair.source)
        return or_first_pair(sharing_map, self.ranking)

    def encode(self, sharing_map: SharingMap) -> dict[str, Any] | None:
        sources = sharing_map.kv_source_layers
        if not 0 < len(sharing_map.targets) <= self.max_shared:
            return None
        if any(
            (target, sources[target]) not in self.setting.places for target in sharing_map.targets
        ):
            return None
        return {
            "num_shared": len(sharing_map.targets),
            **{f"source_{target}": sources[target] for target in self.choices},
        }
