"""The search space ``blocks``: contiguous groups of layers, as in cross-layer attention.

`registry.make_space` makes it for ``search_space=blocks``.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from kvsharer_exp.search.spaces.base import Space, from_pairs, refuse_a_single_map
from kvsharer_exp.values.sharing_map import SharingMap


@dataclass(frozen=True)
class Blocks(Space):
    """The model is cut into contiguous groups; the layers of a group read the group's first layer.

    ``cut_T`` says whether a group starts at layer T. Where attention types are mixed, a layer reads
    the first layer of its group that it may read. Groups lose their last targets until at most
    ``num_shared`` targets are left. If the cuts leave no layer to share, they count as not made.

    The ranking decides which group loses its last target: the one whose last pair comes last in
    the ranking.

    Cross-layer attention (CLA) shares like this, with groups of equal size:
    https://arxiv.org/abs/2405.12981.
    """

    def check(self) -> None:
        if self.max_shared > 1:
            return
        layers = range(self.ranking.num_layers)
        one_group = (
            set(layers[1:]) - set(range(first + 1, last + 1))
            for first in layers
            for last in layers[first + 1 :]
        )
        refuse_a_single_map("blocks", (self._decode(cuts, 1) for cuts in one_group))

    def distributions(self) -> dict[str, BaseDistribution]:
        cuts = {
            f"cut_{layer}": CategoricalDistribution((False, True))
            for layer in range(1, self.ranking.num_layers)
        }
        return {"num_shared": IntDistribution(1, self.max_shared), **cuts}

    def decode(self, params: Mapping[str, Any]) -> SharingMap:
        layers = range(1, self.ranking.num_layers)
        cuts = {layer for layer in layers if params[f"cut_{layer}"]}
        return self._decode(cuts, params["num_shared"])

    def encode(self, sharing_map: SharingMap) -> dict[str, Any] | None:
        if not 0 < len(sharing_map.targets) <= self.max_shared:
            return None
        # A group must reach from its source to its last target. Every other layer starts a group.
        joined = {
            layer
            for target in sharing_map.targets
            for layer in range(sharing_map.kv_source_layers[target] + 1, target + 1)
        }
        layers = range(1, self.ranking.num_layers)
        params: dict[str, Any] = {f"cut_{layer}": layer not in joined for layer in layers}
        params = {"num_shared": len(sharing_map.targets), **params}
        return params if self.decode(params) == sharing_map else None

    def _decode(self, cuts: Set[int], num_shared: int) -> SharingMap:
        groups = self._groups(cuts) or self._groups(set())
        while sum(map(len, groups)) > num_shared:
            last = max(groups, key=lambda group: self.setting.places[group[-1]])
            last.pop()
            if not last:
                groups.remove(last)
        return from_pairs(self.ranking.num_layers, (pair for group in groups for pair in group))

    def _groups(self, cuts: Set[int]) -> list[list[tuple[int, int]]]:
        """The (target, source) pairs of each group that has any, in the order of the layers."""
        groups: list[list[tuple[int, int]]] = []
        owners: list[int] = []
        for layer in range(self.ranking.num_layers):
            if layer == 0 or layer in cuts:
                owners = []
                groups.append([])
            source = next((o for o in owners if (layer, o) in self.setting.places), None)
            if source is None:
                owners.append(layer)
            else:
                groups[-1].append((layer, source))
        return [group for group in groups if group]
