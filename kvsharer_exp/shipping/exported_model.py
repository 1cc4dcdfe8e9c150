"""A causal language model in which some layers, the targets, read the KV of an earlier layer.

``kvsharer export`` writes this file beside the weights, with the model's own class in the line
marked below, and beside it one for the configuration. transformers loads the model from them, and
nothing but torch and transformers is needed.

config.json says which layer reads which, in ``kv_source_layers``: one source per layer, and its own
index for a layer that owns its KV. ``kv_sharing`` in config.json says how attention is built here.
Targets hold no key or value weights, compute no keys or values, and store none. Their attention
calls ``cache.update`` as always, and is given the KV that their source handed over in the same
forward. Method: https://arxiv.org/abs/2410.18517
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM as StockForCausalLM  # the class of this model
from transformers.cache_utils import DummyLayer

from kvsharer_exp.shipping.exported_config import REFUSAL, KVSharedConfig

KeyValue = tuple[torch.Tensor, torch.Tensor]
_FUNCTION = "_gradient_checkpointing_func"  # what checkpoints a block; transformers puts it there


class NoProjection(nn.Module):
    """Stands for a target's key or value projection: returns zeros."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.out_features = features

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.out_features)


class QueryRows(nn.Linear):
    """Stands for a target's fused projection with only its query rows; keys and values are zero.

    The rows come in ``groups`` of [queries | keys and values].
    """

    def __init__(self, hidden: int, groups: int, query_rows: int, kv_rows: int, bias: bool) -> None:
        super().__init__(hidden, groups * query_rows, bias=bias)
        self.groups, self.query_rows, self.kv_rows = groups, query_rows, kv_rows

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        queries = super().forward(hidden_states).unflatten(-1, (self.groups, self.query_rows))
        return nn.functional.pad(queries, (0, self.kv_rows)).flatten(-2)


class CacheView:
    """The cache as one layer sees it: a source hands its KV over, a target takes its source's."""

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
    """Put a `DummyLayer` where a target's cache layer is empty.

    A `DummyLayer` can be cropped and preallocates nothing.
    """
    layers = getattr(cache, "layers", [])
    if layer < len(layers) and not isinstance(layers[layer], DummyLayer):
        if not layers[layer].is_initialized or not int(layers[layer].get_seq_length()):
            layers[layer] = DummyLayer()


class Meeting:
    """Holds the KV that layers of one model hand over, for each thread; a copy starts empty."""

    def __init__(self) -> None:
        self._by_thread: dict[int, dict[int, KeyValue]] = {}

    def here(self) -> dict[int, KeyValue]:
        return self._by_thread.setdefault(self._thread(), {})

    def _thread(self) -> int:
        return 0 if torch.compiler.is_compiling() else threading.get_ident()

    @contextmanager
    def within(self, left: dict[int, KeyValue]) -> Iterator[None]:
        """Let this thread find ``left`` in the block, and afterwards what it had before."""
        thread = self._thread()
        before = self._by_thread.get(thread)
        self._by_thread[thread] = left
        try:
            yield
        finally:
            if before is None:
                del self._by_thread[thread]
            else:
                self._by_thread[thread] = before

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


class Checkpoint:
    """Gradient checkpointing of one block, with the KV it reads as input and hands over as output.

    The block runs again in the backward pass, where its source does not run before it.
    """

    def __init__(
        self, plain: Callable[..., Any], meeting: Meeting, layer: int, source: int, last: bool
    ) -> None:
        self.plain, self.meeting = plain, meeting
        self.layer, self.source, self.last = layer, source, last

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        left, reads = self.meeting.here(), self.source != self.layer
        returns_tuple = False

        def run(*args_and_kv: Any) -> Any:
            nonlocal returns_tuple
            own, read = args_and_kv[: len(args)], args_and_kv[len(args) :]
            inside: dict[int, Any] = {self.source: read} if reads else {}
            with self.meeting.within(inside):
                output = function(*own)
            if reads:
                return output
            returns_tuple = isinstance(output, tuple)
            return (*(output if returns_tuple else (output,)), *inside[self.layer])

        output = self.plain(run, *args, *(left[self.source] if reads else ()))
        if reads:
            if self.last:
                del left[self.source]
            return output
        *output, key, value = output
        left[self.layer] = (key, value)
        return tuple(output) if returns_tuple else output[0]


class PutCheckpoints:
    """A forward pre-hook of the decoder: where blocks are checkpointed, they get `Checkpoint`."""

    def __init__(self) -> None:
        self.blocks: list[tuple[nn.Module, tuple[Any, ...]]] = []

    def __call__(self, module: nn.Module, args: Any) -> None:
        if module.training and torch.is_grad_enabled():
            for block, how in self.blocks:
                plain = getattr(block, _FUNCTION, None)
                if plain is not None and not isinstance(plain, Checkpoint):
                    setattr(block, _FUNCTION, Checkpoint(plain, *how))


class KVSharedForCausalLM(StockForCausalLM):
    """The stock model with ``config.kv_source_layers`` in force."""

    config_class = KVSharedConfig

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say no: weights are read like the stock class's, and renamed where those are renamed."""
        return False

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Refuse engines, which ask whether they may put their own attention and cache in."""
        raise ValueError(REFUSAL)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        how, sources = config.kv_sharing, config.kv_source_layers
        last = {source: layer for layer, source in enumerate(sources) if source != layer}
        meeting, checkpoints = Meeting(), PutCheckpoints()
        modules = dict(self.named_modules())
        for name, attention in modules.items():
            layer = getattr(attention, "layer_idx", None)
            if layer is None or not all(hasattr(attention, part) for part in how["names"]):
                continue
            source = sources[layer]
            if source == layer and layer not in last:
                continue
            is_last = last[source] == layer
            hook = SwapCache(how["cache_argument"], how["cache_position"], meeting, source, is_last)
            attention.register_forward_pre_hook(hook, with_kwargs=True)
            block = modules[name.rpartition(".")[0]]
            checkpoints.blocks.append((block, (meeting, layer, source, is_last)))
            if source != layer:
                for part in how["names"]:
                    setattr(attention, part, _stub(getattr(attention, part), how, config))
        self.base_model.register_forward_pre_hook(checkpoints)


# transformers looks up some renamings of weights by the name of the class. A model that is loaded
# and saved again names its class by that name too, so the class must be found under both.
KVSharedForCausalLM.__name__ = StockForCausalLM.__name__
globals()[StockForCausalLM.__name__] = KVSharedForCausalLM


def _stub(projection: Any, how: dict[str, Any], config: Any) -> nn.Module:
    if "groups" not in how:
        return NoProjection(projection.out_features)
    hidden = config.get_text_config(decoder=True).hidden_size
    biased = getattr(projection, "bias", None) is not None
    return QueryRows(hidden, how["groups"], how["query_rows"], how["kv_rows"], biased)
