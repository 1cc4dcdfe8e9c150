"""What layers left behind under maps scored before, by prefix of the map.

What a layer returns depends on the sources of the layers up to it alone, so maps that agree up to
a layer share its state. The states form a tree, as the KV of prompts does in RadixAttention
(https://arxiv.org/abs/2312.07104), and those not used for longest go first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvsharer_exp.model.sharing.cache import KeyValue
from kvsharer_exp.values.sharing_map import SharingMap


@dataclass(frozen=True, slots=True)
class LayerState:
    """What the block of one layer returned, and the KV of an owner (None: it reads another's)."""

    output: Any
    key_value: KeyValue | None

    @property
    def tensors(self) -> list[torch.Tensor]:
        output = self.output[0] if isinstance(self.output, tuple) else self.output
        return [output, *(self.key_value or ())]


class PrefixStates:
    """The states of one batch of windows, at most ``budget`` bytes of them."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._states: OrderedDict[tuple[int, ...], LayerState] = OrderedDict()
        self.nbytes = 0

    def longest(self, sharing_map: SharingMap) -> list[LayerState]:
        """States of the first layers of ``sharing_map``, as far as they are kept."""
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
        """``states``: of the first layers of ``sharing_map``, without gap."""
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
        sources = sharing_map.kv_source_layers
        for prefix in [p for p in self._states if sources[: len(p)] != p]:
            self.nbytes -= num_bytes(self._states.pop(prefix).tensors)

    def _touch(self, sources: tuple[int, ...], depth: int) -> None:
        """The root last: no layer goes before those after it, which are of no use without it."""
        for end in range(depth, 0, -1):
            self._states.move_to_end(sources[:end])


def num_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes that ``tensors`` hold in memory, what they share once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
