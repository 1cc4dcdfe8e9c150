"""Keep what layers returned under maps scored before, so that an `Evaluator` can resume from it.

What a layer returns depends only on the sources of the layers up to this layer. Maps that agree up
to a layer therefore share its state, and a state is kept under that prefix of the map. The states
form a tree, as the KV of prompts does in RadixAttention. If there are too many, the least recently
used are dropped first. RadixAttention: https://arxiv.org/abs/2312.07104.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from kvsharer_exp.model.sharing.cache import KeyValue
from kvsharer_exp.values.sharing_map import SharingMap


@dataclass(frozen=True, slots=True)
class LayerState:
    """What the block of one layer returned, and the layer's KV.

    ``key_value`` is None for a target, which reads the KV of another layer.
    """

    output: Any
    key_value: KeyValue | None

    @property
    def tensors(self) -> list[torch.Tensor]:
        output = self.output[0] if isinstance(self.output, tuple) else self.output
        return [output, *(self.key_value or ())]


class PrefixStates:
    """The layer states of one batch of windows, at most ``budget`` bytes of them."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._states: OrderedDict[tuple[int, ...], LayerState] = OrderedDict()
        self.nbytes = 0

    def longest(self, sharing_map: SharingMap) -> list[LayerState]:
        """Find the states of the first layers of ``sharing_map``, as far as they are kept."""
        sources = sharing_map.kv_source_layers
        found: list[LayerState] = []
        for depth in range(1, len(sources) + 1):
            state = self._states.get(sources[:depth])
            if state is None:
                break
            found.append(state)
        self._touch(sources, len(found))
        return found

    def keep(self, sharing_map: SharingMap, states: Sequence[LayerState]) -> None:
        """Keep ``states``, which are those of the first layers of ``sharing_map`` without a gap.

        States beyond the budget are dropped, the least recently used first.
        """
        sources = sharing_map.kv_source_layers
        for depth, state in enumerate(states, start=1):
            if sources[:depth] not in self._states:
                self._states[sources[:depth]] = state
                self.nbytes += num_bytes(state.tensors)
        self._touch(sources, len(states))
        while self.nbytes > self._budget:
            _, state = self._states.popitem(last=False)
            self.nbytes -= num_bytes(state.tensors)

    def forget_all_but(self, sharing_map: SharingMap) -> None:
        """Drop all states except those of ``sharing_map``."""
        sources = sharing_map.kv_source_layers
        for prefix in [p for p in self._states if sources[: len(p)] != p]:
            self.nbytes -= num_bytes(self._states.pop(prefix).tensors)

    def _touch(self, sources: tuple[int, ...], depth: int) -> None:
        """Mark the first ``depth`` layers as used, the first layer last.

        So no layer is dropped before the layers after it, whose states are of no use without it.
        """
        for end in range(depth, 0, -1):
            self._states.move_to_end(sources[:end])


def num_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Count the bytes that ``tensors`` hold in memory; memory that they share counts once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def layers_in_common(maps: Sequence[SharingMap]) -> int:
    """The number of first layers whose sources are the same under all ``maps``."""
    by_layer = zip(*(sharing_map.kv_source_layers for sharing_map in maps), strict=True)
    alike = (len(set(sources)) == 1 for sources in by_layer)
    return sum(1 for _ in takewhile(bool, alike))
