"""A causal language model some of whose layers read the KV cache of an earlier layer.

Needs torch and transformers only. ``kvsharer export`` writes this file beside the weights, with
the model's own class in the line marked below; config.json says who reads whom
(``kv_source_layers``: one source per layer, its own index for a layer that owns its KV) and how
attention is built here (``kv_sharing``). Targets hold no key or value weights, compute no keys or
values, and store none: their attention calls ``cache.update`` as always and is given what their
source left there in the same forward. Method: https://arxiv.org/abs/2410.18517
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM as StockForCausalLM  # the class of this model
from transformers.cache_utils import DummyLayer

KeyValue = tuple[torch.Tensor, torch.Tensor]


class NoProjection(nn.Module):
    """Where a target's key or value projection was: zeros, expanded from one token."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.out_features = features

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        zeros = hidden_states.new_zeros(self.out_features)
        return zeros.expand(*hidden_states.shape[:-1], self.out_features)


class QueryRows(nn.Linear):
    """Where a target's fused projection was: its query rows; keys and values are zero.

    Rows come in ``groups`` of [queries | keys and values].
    """

    def __init__(self, hidden: int, groups: int, query_rows: int, kv_rows: int, bias: bool) -> None:
        super().__init__(hidden, groups * query_rows, bias=bias)
        self.groups, self.query_rows, self.kv_rows = groups, query_rows, kv_rows

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        queries = super().forward(hidden_states).unflatten(-1, (self.groups, self.query_rows))
        return nn.functional.pad(queries, (0, self.kv_rows)).flatten(-2)


class CacheView:
    """The cache as one layer sees it: a source leaves its KV, a target takes its source's."""

    def __init__(self, cache: Any, left: dict[int, KeyValue], source: int, last: bool) -> None:
        self._cache, self._left, self._source, self._last = cache, left, source, last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def get_seq_length(self, *args: Any) -> int:
        return 0 if self._cache is None else self._cache.get_seq_length(*args)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeyValue:
        if self._source != layer_idx:
            _vacate(self._cache, layer_idx)
            take = self._left.pop if self._last else self._left.__getitem__
            source_key, source_value = take(self._source)
            return source_key.to(key.device), source_value.to(key.device)
        if self._cache is not None:
            key, value = self._cache.update(key, value, layer_idx, *args, **kwargs)
        self._left[layer_idx] = (key, value)
        return key, value


def _vacate(cache: Any, layer: int) -> None:
    """An empty cache layer of a target says so: it can be cropped and preallocates nothing."""
    layers = getattr(cache, "layers", [])
    if layer < len(layers) and not isinstance(layers[layer], DummyLayer):
        if not layers[layer].is_initialized or not int(layers[layer].get_seq_length()):
            layers[layer] = DummyLayer()


class Meeting:
    """Where the layers of one model leave KV for each other, by thread; a copy starts empty."""

    def __init__(self) -> None:
        self._by_thread: dict[int, dict[int, KeyValue]] = {}

    def here(self) -> dict[int, KeyValue]:
        thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        return self._by_thread.setdefault(thread, {})

    def __reduce__(self) -> tuple[type[Meeting], tuple[()]]:
        return Meeting, ()


class SwapCache:
    """A forward pre-hook of an attention module: its cache argument becomes a `CacheView`."""

    def __init__(
        self, argument: str, position: int, meeting: Meeting, source: int, last: bool
    ) -> None:
        self.argument, self.position, self.meeting = argument, position, meeting
        self.source, self.last = source, last

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        left, at = self.meeting.here(), self.position
        if len(args) > at:
            view = CacheView(args[at], left, self.source, self.last)
            return (*args[:at], view, *args[at + 1 :]), kwargs
        view = CacheView(kwargs.get(self.argument), left, self.source, self.last)
        return args, {**kwargs, self.argument: view}


class KVSharedForCausalLM(StockForCausalLM):
    """The stock model with ``config.kv_source_layers`` in force."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: weights are read as the stock class's are, renamed where transformers renames."""
        return False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        how, sources = config.kv_sharing, config.kv_source_layers
        last = {source: layer for layer, source in enumerate(sources) if source != layer}
        meeting = Meeting()
        for attention in list(self.modules()):
            layer = getattr(attention, "layer_idx", None)
            if layer is None or not all(hasattr(attention, name) for name in how["names"]):
                continue
            source = sources[layer]
            if source == layer and layer not in last:
                continue
            hook = SwapCache(
                how["cache_argument"], how["cache_position"], meeting, source, last[source] == layer
            )
            attention.register_forward_pre_hook(hook, with_kwargs=True)
            if source != layer:
                for name in how["names"]:
                    setattr(attention, name, _stub(getattr(attention, name), how, config))


# transformers looks up some of those renamings by the name of the class.
KVSharedForCausalLM.__name__ = StockForCausalLM.__name__


def _stub(projection: Any, how: dict[str, Any], config: Any) -> nn.Module:
    if "groups" not in how:
        return NoProjection(projection.out_features)
    hidden = config.get_text_config(decoder=True).hidden_size
    biased = getattr(projection, "bias", None) is not None
    return QueryRows(hidden, how["groups"], how["query_rows"], how["kv_rows"], biased)
