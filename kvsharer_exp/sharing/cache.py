"""What an attention layer sees instead of the cache while a map is in force.

Every transformers attention calls ``cache.update(key, value, layer_idx)`` once per forward and
attends to what it returns: after RoPE, with the past, whatever the attention implementation. That
call is the seam. A source hands its result on; a target takes its source's and stores nothing, so
every kind of cache (dynamic, static, sliding, quantised, offloaded) works, also none at all.
"""

from __future__ import annotations

from typing import Any

import torch

KeyValue = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each (batch, num_key_value_heads, sequence, head_dim)."""


class _LayerView:
    """The cache as one layer sees it; anything but ``update`` goes to the real cache."""

    def __init__(self, cache: Any, shared: dict[int, KeyValue]) -> None:
        self._cache = cache
        self._shared = shared

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def get_seq_length(self, *args: Any) -> int:
        return 0 if self._cache is None else self._cache.get_seq_length(*args)


class SourceView(_LayerView):
    """Stores as usual and leaves the KV for the layers that read it."""

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeyValue:
        if self._cache is not None:
            key, value = self._cache.update(key, value, layer_idx, *args, **kwargs)
        self._shared[layer_idx] = (key, value)
        return key, value


class TargetView(_LayerView):
    """Stores nothing; gives the source's KV. ``was_read`` proves the attention went through."""

    def __init__(self, cache: Any, shared: dict[int, KeyValue], source: int, last: bool) -> None:
        super().__init__(cache, shared)
        self._source = source
        self._last = last
        self.was_read = False

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeyValue:
        self.was_read = True
        take = self._shared.pop if self._last else self._shared.__getitem__
        source_key, source_value = take(self._source)
        # Under a device map the source may live elsewhere; a no-op on one device.
        return source_key.to(key.device), source_value.to(key.device)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values ``cache`` holds, counted on its tensors."""
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(tensor, torch.Tensor)
    )
