"""Keep what layers returned under plans scored before, so that an `Evaluator` can resume from it.

What a layer returns depends only on the actions of the layers up to this layer, and on the fits of
its stand-ins. Plans that agree up to a layer therefore share its state, and a state is kept under
that prefix of the plan's keys (`FittedPlan.keys`). The states
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

from kvsharer_exp.measure.blocks import num_bytes
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.sharing.exchange import Handed, KeyValue, take


@dataclass(frozen=True, slots=True)
class LayerState:
    """What the block of one layer returned, and the layer's KV.

    ``key_value`` is None for a layer that keeps none of its own.
    """

    output: Any
    key_value: KeyValue | None

    @property
    def tensors(self) -> list[torch.Tensor]:
        output = self.output[0] if isinstance(self.output, tuple) else self.output
        if self.key_value is None:
            return [output]
        key, value, columns = self.key_value
        return [output, key, value, *([] if columns is None else columns.tensors)]


class PrefixStates:
    """The layer states of one batch of windows, at most ``budget`` bytes of them."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._states: OrderedDict[tuple[str, ...], LayerState] = OrderedDict()
        self.nbytes = 0

    def longest(self, plan: FittedPlan) -> list[LayerState]:
        """Find the states of the first layers of ``plan``, as far as they are kept."""
        keys = plan.keys
        found: list[LayerState] = []
        for depth in range(1, len(keys) + 1):
            state = self._states.get(keys[:depth])
            if state is None:
                break
            found.append(state)
        self._touch(keys, len(found))
        return found

    def keep(self, plan: FittedPlan, states: Sequence[LayerState]) -> None:
        """Keep ``states``, which are those of the first layers of ``plan`` without a gap.

        States beyond the budget are dropped, the least recently used first.
        """
        keys = plan.keys
        for depth, state in enumerate(states, start=1):
            if keys[:depth] not in self._states:
                self._states[keys[:depth]] = state
                self.nbytes += num_bytes(state.tensors)
        self._touch(keys, len(states))
        while self.nbytes > self._budget:
            _, state = self._states.popitem(last=False)
            self.nbytes -= num_bytes(state.tensors)

    def forget_all_but(self, plan: FittedPlan) -> bool:
        """Drop all states except those of ``plan``; returns whether there were any."""
        keys = plan.keys
        others = [p for p in self._states if keys[: len(p)] != p]
        for prefix in others:
            self.nbytes -= num_bytes(self._states.pop(prefix).tensors)
        return bool(others)

    def _touch(self, keys: tuple[str, ...], depth: int) -> None:
        """Mark the first ``depth`` layers as used, the first layer last.

        So no layer is dropped before the layers after it, whose states are of no use without it.
        """
        for end in range(depth, 0, -1):
            self._states.move_to_end(keys[:end])


def layers_in_common(plans: Sequence[FittedPlan]) -> int:
    """The number of first layers that do the same under all ``plans``."""
    by_layer = zip(*(plan.keys for plan in plans), strict=True)
    alike = (len(set(keys)) == 1 for keys in by_layer)
    return sum(1 for _ in takewhile(bool, alike))


def kept_by(plan: FittedPlan, layer: int, handed: Handed, part: tuple[int, int]) -> KeyValue | None:
    """What ``layer`` keeps in one ``part`` (number, count) of a batch that runs under ``plan``.

    It is copied, so that the rest of the batch can go; None if the layer keeps nothing.
    """
    if layer not in (plan.plan.key_sources[layer], plan.plan.value_sources[layer]):
        return None
    own = take(handed, layer, part)
    assert own is not None
    return own if part[1] == 1 else KeyValue(own.key.clone(), own.value.clone(), own.columns)
