"""The search space ``suffix``: the trailing layers read one earlier layer.

Serving engines can run such maps today. `registry.make_space` makes the space for
``search_space=suffix``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution, IntDistribution

from kvsharer_exp.search.spaces.base import Space, from_pairs, refuse_a_single_map
from kvsharer_exp.values.sharing_map import SharingMap


@dataclass(frozen=True)
class Suffix(Space):
    """The last ``num_shared`` layers (the suffix) all read one owner before them, ``source``.

    The layers of each attention type read the owner of their type before the suffix that is nearest
    to ``source``; of two equally near ones, the earlier. A trailing layer with no layer of its type
    before the suffix stays an owner, and the suffix grows instead.

    The ranking says which pairs may share and nothing else: two parameters leave nothing to order.

    YOCO shares like this, https://arxiv.org/abs/2405.05254. vLLM, SGLang and llama.cpp can serve
    such maps.
    """

    def check(self) -> None:
        wishes = range(self.ranking.num_layers - 1)
        sizes = range(1, self.max_shared + 1)
        refuse_a_single_map("suffix", (self._decode(n, wish) for n in sizes for wish in wishes))

    def distributions(self) -> dict[str, BaseDistribution]:
        return {
            "num_shared": IntDistribution(1, self.max_shared),
            "source": IntDistribution(0, self.ranking.num_layers - 2),
        }

    def decode(self, params: Mapping[str, Any]) -> SharingMap:
        return self._decode(params["num_shared"], params["source"])

    def encode(self, sharing_map: SharingMap) -> dict[str, Any] | None:
        count = len(sharing_map.targets)
        if not 0 < count <= self.max_shared or set(sharing_map.targets) != set(self._read(count)):
            return None
        for wish in range(self.ranking.num_layers - 1):
            if self._decode(count, wish) == sharing_map:
                return {"num_shared": count, "source": wish}
        return None

    @cached_property
    def _suffixes(self) -> list[dict[int, list[int]]]:
        """For suffixes of 1, 2, … layers: the layers before them that each target may read."""
        layers = self.ranking.num_layers
        suffixes = []
        for start in range(layers - 1, 0, -1):
            before = {
                target: [source for source in sources if source < start]
                for target, sources in self.setting.sources.items()
                if target >= start
            }
            suffixes.append({target: sources for target, sources in before.items() if sources})
        return suffixes

    def _read(self, num_shared: int) -> dict[int, list[int]]:
        """The shortest suffix with ``num_shared`` targets, or else with the most below that."""
        fitting = [suffix for suffix in self._suffixes if len(suffix) <= num_shared]
        return max(fitting, key=len)

    def _decode(self, num_shared: int, wish: int) -> SharingMap:
        pairs = [
            (target, min(sources, key=lambda source: (abs(source - wish), source)))
            for target, sources in self._read(num_shared).items()
        ]
        return from_pairs(self.ranking.num_layers, pairs)
