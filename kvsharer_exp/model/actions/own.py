"""Runs the action ``own``: keeps a layer's KV, as it is or in few bits, of all tokens or some."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

from kvsharer_exp.model.actions.base import ActionRunner
from kvsharer_exp.model.sharing.architectures import AttentionLayer
from kvsharer_exp.model.sharing.cache import LayerView
from kvsharer_exp.model.sharing.exchange import KeyValue
from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.model.sharing.site import Site
from kvsharer_exp.model.stores.base import Store
from kvsharer_exp.model.stores.columns import Columns
from kvsharer_exp.model.stores.registry import make_store, store_type
from kvsharer_exp.model.stores.weights import Queries
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.keeps.window import Window


class OwnRunner(ActionRunner):
    """A layer that keeps all in 16 bits is left alone, but that it hands its KV over."""

    action: Own

    @property
    def counts_tokens(self) -> bool:  # type: ignore[override]
        return self.action.quantised or self.action.bounded

    def check(self, layer: AttentionLayer, layers: tuple[AttentionLayer, ...]) -> None:
        heads, keys, values = layer.kv_shape
        if self.action.quantised and (keys != values or keys // heads % 8):
            raise SharingError(
                f"layer {layer.index} cannot keep {self.action.bits} bits: its heads have "
                f"{keys // heads} key and {values // heads} value channels; give equal multiples "
                "of 8, or 16 bits"
            )
        keep, window = self.action.keep, layer.window
        if keep is None or window is None:
            return
        if keep.prompted:
            shorter = Window(min(4, window // 4), max(1, window // 2))
            raise SharingError(
                f"layer {layer.index} cannot keep {keep}: its own window of {window} tokens lets "
                f"go of the prompt; give a window like {shorter}, or all tokens"
            )
        if isinstance(keep, Window) and not keep.is_within(window):
            raise SharingError(
                f"layer {layer.index} cannot keep {keep}: its own window of {window} tokens "
                "is no longer, so nothing would be saved; give fewer recent tokens"
            )

    def kv_bytes(
        self, layer: AttentionLayer, context: int, size: int, prompt: int | None = None
    ) -> int:
        first = layer.first_read(context)
        store = store_type(self.action)
        return store.held_bytes(self.action, layer.kv_shape, size, context, prompt, first)

    def tokens_read(self, layer: AttentionLayer, context: int) -> int:
        keep, first = self.action.keep, layer.first_read(context)
        if keep is None:
            return context - first
        if not isinstance(keep, Window):
            return keep.held(context)
        recent = max(first, keep.first_recent(context))
        return context - recent + max(0, min(keep.sinks, recent) - first)

    def install(self, site: Site) -> None:
        sources = (site.layer.index, site.layer.index)
        if self.counts_tokens:
            watches = store_type(self.action).watches
            site.hook(partial(StoreView, self.action, site.prompt), sources, watches=watches)
        elif site.hands_over:
            site.hook(LayerView, sources)


class StoreView(LayerView):
    """Keeps a layer's KV in a `Store`: that of the cache, or without one for one forward."""

    def __init__(
        self, action: Own, prompt: int | None, cache: Any, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(cache, *args, **kwargs)
        self._action, self._prompt, self._watched = action, prompt, False

    def columns(
        self, layer: int, hidden: torch.Tensor, pads: torch.Tensor | None
    ) -> Columns | None:
        if self._cache is None:
            self._store = make_store(self._action, lasting=False, prompt=self._prompt)
        else:
            self._store = _store_of(self._cache, layer, self._action, self._prompt)
        return self._store.prepare(hidden.shape[1], pads, hidden.device)

    def keep(self, own: KeyValue, layer_idx: int, *args: Any, **kwargs: Any) -> KeyValue:
        update: Callable[..., Any] = self._store.update
        if self._cache is not None:
            update = partial(self._cache.update, layer_idx=layer_idx)
        key, value = update(own.key, own.value)
        return KeyValue(key, value, self.laid_out)

    def missed(self) -> str:
        if self._store.watches and not self._watched:
            return f"showed its queries to nobody, so {self._action.keep} chose nothing by them"
        return super().missed()

    def watch(self, layer: int, queries: Queries, read: KeyValue) -> KeyValue:
        self._watched = True
        other = self._store.watch(queries, read.key, read.value)
        if other is None:
            return read
        key, value, columns = other
        self.hand_over(layer, KeyValue(key, value, columns))
        return KeyValue(key, columns.values(value), columns)


def _store_of(cache: Any, layer: int, action: Own, prompt: int | None) -> Store:
    """The store of ``cache`` at ``layer``, put in place of an empty dynamic layer.

    Raises:
        SharingError: the cache is of another kind, or the layer holds other KV.
    """
    layers: list[Any] = getattr(cache, "layers", [])
    if getattr(cache, "layer_class_to_replicate", None) is not None:
        while len(layers) <= layer:
            layers.append(cache.layer_class_to_replicate())
    held = layers[layer] if layer < len(layers) else None
    if isinstance(held, Store) and held.action == action:
        return held
    if isinstance(held, StaticLayer) or not isinstance(held, DynamicLayer):
        raise SharingError(
            f"layer {layer} keeps {action.words}, which a {type(held).__name__} of the "
            "cache cannot hold: use the dynamic cache (no cache_implementation)"
        )
    if type(held).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
        raise SharingError(
            f"layer {layer} keeps {action.words}, but the cache quantises too "
            f"({type(held).__name__}): use one of the two"
        )
    if held.is_initialized and held.get_seq_length():
        raise SharingError(
            f"layer {layer} of the cache holds KV of all tokens in full: give a new cache "
            "under this plan"
        )
    layers[layer] = make_store(action, getattr(held, "sliding_window", None), prompt=prompt)
    return layers[layer]
