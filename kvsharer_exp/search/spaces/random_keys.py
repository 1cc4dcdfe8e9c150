"""A priority per layer, and one rule for what the layers chosen by it read."""

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

# Which of the owners a layer may read, given most dissimilar first.
RULES: dict[str, Callable[[Sequence[int]], int]] = {
    "nearest": max,
    "first": min,
    "dissimilar": itemgetter(0),
    "similar": itemgetter(-1),
}


@dataclass(frozen=True)
class RandomKeys(Space):
    """The ``num_shared`` layers of the highest keys read the owner that ``source_rule`` picks.

    The key of layer T is ``priority_T`` in [0, 1] plus ``ranking_weight`` in [-1, 1] times its
    standing in the ranking. Rules: the ``nearest`` owner before the layer, the ``first`` of the
    model, the most ``dissimilar``, the most ``similar``. A layer whose sharing would leave a
    target without an owner is passed over. Holds the maps that follow one rule throughout.
    Random keys: Bean 1994, https://doi.org/10.1287/ijoc.6.2.154.

    The ranking is in two of the rules, and in the keys as far as the search finds it of use:
    a positive ``ranking_weight`` prefers layers of dissimilar pairs, a negative one of similar.
    """

    @cached_property
    def standings(self) -> dict[int, float]:
        """1 for the layer that reads in the ranking's first pair, towards 0 by first place."""
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
        """What ``target`` may read when ``targets`` do not own, most dissimilar first."""
        return [source for source in self.setting.sources[target] if source not in targets]
