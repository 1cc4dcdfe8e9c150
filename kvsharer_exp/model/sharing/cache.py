"""What an attention layer sees instead of the cache while a plan is in force.

The hooks of `site` give each attention that stores, hands over or reads KV for a plan a `LayerView`
of the cache.

Every transformers attention calls ``cache.update(key, value, layer_idx)`` once per forward and
attends to what the call returns: keys and values after RoPE, with those of the past, whatever the
attention implementation. That call is the seam. A source hands over what the call returned. A
target takes what its source handed over, and stores nothing. So every kind of cache works (dynamic,
static, sliding, quantised, offloaded), and so does no cache at all.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers.cache_utils import DummyLayer

from kvsharer_exp.model.sharing.exchange import Handed, KeyValue, put, take
from kvsharer_exp.model.sharing.projections import QueryRows, SharingError
from kvsharer_exp.model.stores.base import Store
from kvsharer_exp.model.stores.columns import Columns
from kvsharer_exp.model.stores.weights import Queries


class LayerView:
    """The cache as one layer sees it; everything but ``update`` goes to the real cache.

    An instance serves one forward of one attention, which has to use it (`missed`).

    Args:
        cache: the real cache, or None.
        handed: where KV is handed over.
        part: the part of the batch that runs, and the number of parts; None for the whole batch.
        sources: the layers whose keys and values are read.
        hands_over: whether others read what this layer keeps.
        done: sources that no layer after this one reads, so that their KV can go.
        rows: the stub of a fused projection, which is told what its zeros became.
    """

    def __init__(
        self,
        cache: Any,
        handed: Handed,
        part: tuple[int, int] | None,
        *,
        sources: tuple[int, int],
        hands_over: bool,
        done: Collection[int] = (),
        rows: QueryRows | None = None,
    ) -> None:
        self._cache, self._handed, self._part = cache, handed, part
        self._sources, self._hands_over = sources, hands_over
        self._done, self._rows = done, rows
        self.was_read = False
        self.laid_out: Columns | None = None  # what `columns` said

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def get_seq_length(self, *args: Any) -> int:
        return 0 if self._cache is None else self._cache.get_seq_length(*args)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep what the layer owns of ``key`` and ``value``; return what its attention reads."""
        self.was_read = True
        if self._rows is not None:
            self._rows.confirm(layer_idx, key, value)
        own = KeyValue(key, value)
        if any(source == layer_idx for source in self._sources):  # `in` fails when compiled
            own = self.keep(own, layer_idx, *args, **kwargs)
        else:
            vacate(self._cache, layer_idx)
        self.hand_over(layer_idx, own)
        keys, values = (
            own if source == layer_idx else self._of(source, layer_idx) for source in self._sources
        )
        for source in self._done:
            del self._handed[source]
        # Under a device map the source may be on another device; on one device this does nothing.
        read = values.value.to(key.device)
        if keys.columns is not None:
            read = keys.columns.values(read)
        return keys.key.to(key.device), read

    def missed(self) -> str:
        """Why the plan does not hold in this attention; empty if it does."""
        return "" if self.was_read else "did not read its source's KV through cache.update"

    def hand_over(self, layer: int, own: KeyValue) -> None:
        """Let others read ``own``, if there are any."""
        if self._hands_over:
            put(self._handed, layer, self._part, own)

    def watch(self, layer: int, queries: Queries, read: KeyValue) -> KeyValue:
        """See the queries that will read ``read``; return what they must read.

        Of both, values have the columns of the keys. Attention asks this where it can
        (`queries.observe`).
        """
        return read

    def columns(
        self, layer: int, hidden: torch.Tensor, pads: torch.Tensor | None
    ) -> Columns | None:
        """The columns of the keys that will be read, before the attention of ``layer`` runs.

        None: one column a token, as the model's mask has it. ``hidden`` is the attention's input
        (batch, tokens, hidden_size), and ``pads`` (batch,) the padding in front of each row.
        """
        source = self._sources[0]
        return None if source == layer else self._of(source, layer).columns

    def keep(self, own: KeyValue, layer_idx: int, *args: Any, **kwargs: Any) -> KeyValue:
        """Store what the layer made; return it with what was stored before."""
        if self._cache is None:
            return own
        return KeyValue(*self._cache.update(own.key, own.value, layer_idx, *args, **kwargs))

    def _of(self, source: int, layer: int) -> KeyValue:
        found = take(self._handed, source, self._part)
        if found is None:
            raise SharingError(
                f"layer {layer} runs without layer {source}, whose KV it reads: run the "
                "whole model, and checkpoint by model.gradient_checkpointing_enable only"
            )
        return found


def vacate(cache: Any, layer: int) -> None:
    """Put transformers' `DummyLayer` at ``layer`` of ``cache``, unless the layer holds KV.

    There are four reasons. transformers asks the first layer that is no dummy for the length of
    the text. An empty sliding layer cannot be cropped, because that reads the length of keys that
    are not there. A preallocated layer wastes memory. And a cache that was filled under a plan must
    not pass for a full one later. A `DummyLayer` is right in all four cases.
    """
    layers: list[Any] | None = getattr(cache, "layers", None)
    if layers is None or layer > len(layers):
        return
    if layer == len(layers):  # the cache makes its layers when they are first updated
        layers.append(DummyLayer())
    held = layers[layer]
    if not isinstance(held, DummyLayer) and not (
        held.is_initialized and int(held.get_seq_length())
    ):
        layers[layer] = DummyLayer()


def cache_bytes(cache: Any) -> int:
    """Count the bytes of the keys and values that ``cache`` holds, on its tensors.

    A `Store` counts as it holds them: codes with their scales, and what is kept in full.
    """
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    total = 0
    for layer in cache.layers:
        if isinstance(layer, Store):
            total += sum(map(_tensor_bytes, layer.tensors))
        else:
            total += sum(_tensor_bytes(getattr(layer, name, None)) for name in names)
    return total


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
