"""Runs the action ``own``: keeps a layer's KV, as it is or in few bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

from kvsharer_exp.model.actions.base import ActionRunner
from kvsharer_exp.model.packed.columns import Columns
from kvsharer_exp.model.packed.layer import PackedLayer
from kvsharer_exp.model.sharing.architectures import AttentionLayer
from kvsharer_exp.model.sharing.cache import LayerView
from kvsharer_exp.model.sharing.exchange import KeyValue
from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.model.sharing.site import Site
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.precision import Precision


class OwnRunner(ActionRunner):
    """A layer in 16 bits is left alone, but that it hands its KV over; others store codes."""

    action: Own

    @property
    def counts_tokens(self) -> bool:  # type: ignore[override]
        return self.action.quantised

    def check(self, layer: AttentionLayer, layers: tuple[AttentionLayer, ...]) -> None:
        heads, keys, values = layer.kv_shape
        if self.action.quantised and (keys != values or keys // heads % 8):
            raise SharingError(
                f"layer {layer.index} cannot keep {self.action.bits} bits: its heads have "
                f"{keys // heads} key and {values // heads} value channels; give equal multiples "
                "of 8, or 16 bits"
            )

    def kv_bytes(self, layer: AttentionLayer, context: int, size: int) -> int:
        heads, keys, values = layer.kv_shape
        held, precision = (context, layer.first_read(context)), self.action.precision
        return precision.key_bytes(*held, heads, keys // heads, size) + precision.value_bytes(
            *held, heads, values // heads, size
        )

    def install(self, site: Site) -> None:
        sources = (site.layer.index, site.layer.index)
        if self.action.quantised:
            site.hook(partial(PackedView, self.action.precision), sources)
        elif site.hands_over:
            site.hook(LayerView, sources)


class PackedView(LayerView):
    """Keeps a layer's KV in a `PackedLayer`: that of the cache, or without one for one forward."""

    def __init__(self, precision: Precision, cache: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(cache, *args, **kwargs)
        self._precision = precision

    def columns(
        self, layer: int, hidden: torch.Tensor, pads: torch.Tensor | None
    ) -> Columns | None:
        if self._cache is None:
            self._store = PackedLayer(self._precision, packing=False)
        else:
            self._store = _packed(self._cache, layer, self._precision)
        self._columns = self._store.prepare(hidden.shape[1], pads, hidden.device)
        return self._columns

    def keep(self, own: KeyValue, layer_idx: int, *args: Any, **kwargs: Any) -> KeyValue:
        update: Callable[..., Any] = self._store.update
        if self._cache is not None:
            update = partial(self._cache.update, layer_idx=layer_idx)
        key, value = update(own.key, own.value)
        return KeyValue(key, value, self._columns)


def _packed(cache: Any, layer: int, precision: Precision) -> PackedLayer:
    """The packed layer of ``cache``, put in place of an empty dynamic one.

    Raises:
        SharingError: the cache is of another kind, or the layer holds KV that is not packed.
    """
    layers: list[Any] = getattr(cache, "layers", [])
    if getattr(cache, "layer_class_to_replicate", None) is not None:
        while len(layers) <= layer:
            layers.append(cache.layer_class_to_replicate())
    held = layers[layer] if layer < len(layers) else None
    if isinstance(held, PackedLayer) and held.precision == precision:
        return held
    if isinstance(held, StaticLayer) or not isinstance(held, DynamicLayer):
        raise SharingError(
            f"layer {layer} keeps {precision.bits} bits, which a {type(held).__name__} of the "
            "cache cannot hold: use the dynamic cache (no cache_implementation)"
        )
    if type(held).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
        raise SharingError(
            f"layer {layer} keeps {precision.bits} bits, but the cache quantises too "
            f"({type(held).__name__}): use one of the two"
        )
    if held.is_initialized and held.get_seq_length():
        raise SharingError(
            f"layer {layer} of the cache holds KV that is not quantised: give a new cache "
            "under this plan"
        )
    layers[layer] = PackedLayer(precision, getattr(held, "sliding_window", None))
    return layers[layer]
