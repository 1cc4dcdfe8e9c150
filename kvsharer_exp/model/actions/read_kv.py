"""Runs the action ``read_kv``: keys of one layer and values of another; one may be its own."""

from __future__ import annotations

from typing import Any

from kvsharer_exp.model.actions.base import ActionRunner, check_source
from kvsharer_exp.model.sharing.architectures import AttentionLayer
from kvsharer_exp.model.sharing.cache import LayerView
from kvsharer_exp.model.sharing.exchange import KeyValue
from kvsharer_exp.model.sharing.site import Site
from kvsharer_exp.values.actions.read_kv import ReadKV


class ReadKVRunner(ActionRunner):
    """A half that is the layer's own is stored, in 16 bits; the other is not even made."""

    action: ReadKV

    def check(self, layer: AttentionLayer, layers: tuple[AttentionLayer, ...]) -> None:
        for source in (self.action.key_source, self.action.value_source):
            check_source(layer, layers[source])

    def _owns(self, layer: AttentionLayer) -> tuple[bool, bool]:
        return self.action.key_source == layer.index, self.action.value_source == layer.index

    def kv_bytes(
        self, layer: AttentionLayer, context: int, size: int, prompt: int | None = None
    ) -> int:
        _, keys, values = layer.kv_shape
        key, value = self._owns(layer)
        return (context - layer.first_read(context)) * (key * keys + value * values) * size

    def parameter_bytes(self, layer: AttentionLayer) -> int:
        key, value = self._owns(layer)
        return layer.projections.parameter_bytes(key=not key, value=not value)

    def weights_saved(self, layer: AttentionLayer) -> int:
        key, value = self._owns(layer)
        return layer.projections.num_weights(key=not key, value=not value)

    def install(self, site: Site) -> None:
        key, value = self._owns(site.layer)
        rows = site.stub(not key, not value)
        sources = (self.action.key_source, self.action.value_source)
        site.hook(HalfView if key or value else LayerView, sources, rows)


class HalfView(LayerView):
    """Stores the layer's own half, in the place of the keys whichever it is.

    transformers counts the tokens of a layer on its keys.
    """

    def keep(self, own: KeyValue, layer_idx: int, *args: Any, **kwargs: Any) -> KeyValue:
        if self._cache is None:
            return own
        keys = self._sources[0] == layer_idx
        half = own.key if keys else own.value
        held, _ = self._cache.update(half, half[..., :0], layer_idx, *args, **kwargs)
        return KeyValue(held, own.value) if keys else KeyValue(own.key, held)
