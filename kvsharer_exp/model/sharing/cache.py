"""What an attention layer sees instead of the cache while a map is in force.

`hooks` gives each source a `SourceView` of the cache, and each target a `TargetView`.

Every transformers attention calls ``cache.update(key, value, layer_idx)`` once per forward and
attends to what the call returns: keys and values after RoPE, with those of the past, whatever the
attention implementation. That call is the seam. A source hands over what the call returned. A
target takes what its source handed over, and stores nothing. So every kind of cache works (dynamic,
static, sliding, quantised, offloaded), and so does no cache at all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers.cache_utils import DummyLayer

from kvsharer_exp.model.sharing.projections import QueryRows, SharingError

KeyValue = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each (batch, num_key_value_heads, sequence, head_dim)."""


class _LayerView:
    """The cache as one layer sees it; everything but ``update`` goes to the real cache."""

    def __init__(self, cache: Any, handed: dict[int, KeyValue]) -> None:
        self._cache = cache
        self._handed = handed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def get_seq_length(self, *args: Any) -> int:
        return 0 if self._cache is None else self._cache.get_seq_length(*args)


class SourceView(_LayerView):
    """Stores KV as usual, and hands it over to the layers that read it."""

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeyValue:
        if self._cache is not None:
            key, value = self._cache.update(key, value, layer_idx, *args, **kwargs)
        self._handed[layer_idx] = (key, value)
        return key, value


class TargetView(_LayerView):
    """Stores nothing and returns the KV of the source; ``was_read`` proves that attention used it.

    Args:
        sources: one source per map, each for an equal part of the batch. It is the layer itself
            under a map that lets the layer own its KV.
        done: sources that no layer after this one reads, so that their KV can go.
        rows: the stub of a fused projection, which is told what its zeros became.
    """

    def __init__(
        self,
        cache: Any,
        handed: dict[int, KeyValue],
        sources: tuple[int, ...],
        done: Collection[int] = (),
        rows: QueryRows | None = None,
    ) -> None:
        super().__init__(cache, handed)
        self._sources = sources
        self._done = done
        self._rows = rows
        self.was_read = False

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeyValue:
        self.was_read = True
        if self._rows is not None:
            self._rows.confirm(layer_idx, key, value)
        if layer_idx in self._sources:  # the layer is an owner under some of the maps
            self._handed[layer_idx] = (key, value)
        else:
            _vacate(self._cache, layer_idx)
        missing = [source for source in self._sources if source not in self._handed]
        if missing:
            raise SharingError(
                f"layer {layer_idx} runs without layer {missing[0]}, whose KV it reads: run the "
                "whole model, and checkpoint by model.gradient_checkpointing_enable only"
            )
        given = _parts([self._handed[source] for source in self._sources], self._sources)
        for source in self._done:
            del self._handed[source]
        # Under a device map the source may be on another device; on one device this does nothing.
        return given[0].to(key.device), given[1].to(key.device)


def _parts(given: Sequence[KeyValue], sources: tuple[int, ...]) -> KeyValue:
    """Take each of the equal parts of the batch from its own source."""
    if len(set(sources)) == 1:
        return given[0]
    keys = [key.chunk(len(given))[part] for part, (key, _) in enumerate(given)]
    values = [value.chunk(len(given))[part] for part, (_, value) in enumerate(given)]
    return torch.cat(keys), torch.cat(values)


def _vacate(cache: Any, layer: int) -> None:
    """Put transformers' `DummyLayer` at ``layer`` of ``cache``, unless the layer holds KV.

    There are three reasons. An empty sliding layer cannot be cropped, because that reads the length
    of keys that are not there. A preallocated layer wastes memory. And a cache that was filled
    under a map must not pass for a full one later. A `DummyLayer` is right in all three cases.
    """
    layers: list[Any] = getattr(cache, "layers", [])
    if layer < len(layers) and not isinstance(layers[layer], DummyLayer):
        held = layers[layer]
        if not held.is_initialized or not int(held.get_seq_length()):
            layers[layer] = DummyLayer()


def cache_bytes(cache: Any) -> int:
    """Count the bytes of the keys and values that ``cache`` holds, on its tensors.

    A quantised layer counts as it is stored: the quantised tensor with its scale, and the residual.
    """
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    return sum(
        _tensor_bytes(getattr(layer, name, None)) for layer in cache.layers for name in names
    )


def _tensor_bytes(stored: Any) -> int:
    if isinstance(stored, torch.Tensor):
        flatten = getattr(stored, "__tensor_flatten__", None)  # names a wrapper's parts
        if flatten is not None:
            return sum(_tensor_bytes(getattr(stored, name)) for name in flatten()[0])
        return stored.numel() * stored.element_size()
    if isinstance(stored, tuple):
        return sum(_tensor_bytes(part) for part in stored)
    if isinstance(stored, dict):
        return sum(_tensor_bytes(part) for part in stored.values())
    return 0
