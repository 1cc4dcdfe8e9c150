"""The search space ``random_keys``: a priority per layer, and one rule for what targets read.

`registry.make_space` makes it for ``search_space=random_keys``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from kvsharer_exp.search.spaces.base import Space, from_pairs
from kvsharer_exp.values.sharing_map import SharingMap

# A rule picks one of the owners that a layer may read; they are given most dissimilar first.
RULES: dict[str, Callable[[Sequence[int]], int]] = {
    "nearest": max,
    "first": min,
    "dissimilar": itemgetter(0),
    "similar": itemgetter(-1),
}


@dataclass(frozen=True)
class RandomKeys(Space):
    """The ``num_shared`` layers with the highest keys read the owner that ``source_rule`` picks.

    The key of layer T is ``priority_T`` in [0, 1] plus ``ranking_weight`` in [-1, 1] times the
    standing of T in the ranking. The rule picks, of the owners that the layer may read, the
    ``nearest`` before the layer, the ``first`` of the model, the most ``dissimilar`` or the most
    ``similar`` one. A layer is passed over if sharing it would leave a target without an owner to
    read. The space holds the maps in which all targets follow one rule.

    The ranking decides in two of the rules. It also counts in the keys, as far as the search finds
    it useful: a positive ``ranking_weight`` prefers layers of dissimilar pairs, a negative one
    prefers layers of similar pairs.

    Random keys: Bean 1994, https://doi.org/10.1287/ijoc.6.2.154.
    """

    @cached_property
    def standings(self) -> dict[int, float]:
        """The standing in the ranking of each layer that may be a target.

        It is 1 for the target of the first pair, and nearer 0 the later a layer's first pair comes.
        """
        places, count = self.setting.places, len(self.ranking.pairs)
        return {
            target: 1 - places[target, sources[0]] / count
            for target, sources in self.setting.sources.items()
        }

    def distributions(self) -> dict[str, BaseDistribution]:
        return {
            "num_shared": IntDistribution(1, self.max_shared),
            "source_rule": CategoricalDistribution(tuple(RULES)),
            "ranking_weight": FloatDistribution(-1, 1),
            **{f"priority_{target}": FloatDistribution(0, 1) for target in self.standings},
        }

    def decode(self, params: Mapping[str, Any]) -> SharingMap:
        def key(layer: int) -> float:
            lean: float = params["ranking_weight"] * self.standings[layer]
            return lean + float(params[f"priority_{layer}"])

        targets: frozenset[int] = frozenset()
        for layer in sorted(self.standings, key=key, reverse=True):
            if len(targets) == params["num_shared"]:
                break
            if all(self._owners(target, targets | {layer}) for target in targets | {layer}):
                targets |= {layer}
        rule = RULES[params["source_rule"]]
        pairs = [(target, rule(self._owners(target, targets))) for target in targets]
        return from_pairs(self.ranking.num_layers, pairs)

    def encode(self, sharing_map: SharingMap) -> dict[str, Any] | None:
        targets = frozenset(sharing_map.targets)
        if not 0 < len(targets) <= self.max_shared or not targets <= self.standings.keys():
            return None
        owners = {target: self._owners(target, targets) for target in targets}
        for name, rule in RULES.items():
            if all(
                allowed and rule(allowed) == sharing_map.kv_source_layers[target]
                for target, allowed in owners.items()
            ):
                return {
                    "num_shared": len(targets),
                    "source_rule": name,
                    "ranking_weight": 0.0,
                    **{f"priority_{layer}": float(layer in targets) for layer in self.standings},
                }
        return None

    def _owners(self, target: int, targets: Set[int]) -> list[int]:
        """The owners that ``target`` may read beside ``targets``, most dissimilar first."""
        return [source for source in self.setting.sources[target] if source not in targets]
