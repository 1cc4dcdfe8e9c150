"""Runs the action ``read``: a layer reads the KV of an earlier one, and makes and stores none."""

from __future__ import annotations

from kvsharer_exp.model.actions.base import ActionRunner, check_source
from kvsharer_exp.model.sharing.architectures import AttentionLayer
from kvsharer_exp.model.sharing.cache import LayerView
from kvsharer_exp.model.sharing.site import Site
from kvsharer_exp.values.actions.read import Read


class ReadRunner(ActionRunner):
    """Method: KVSharer, https://arxiv.org/abs/2410.18517 §3.3."""

    action: Read

    def check(self, layer: AttentionLayer, layers: tuple[AttentionLayer, ...]) -> None:
        check_source(layer, layers[self.action.source])

    def parameter_bytes(self, layer: AttentionLayer) -> int:
        return layer.kv_parameter_bytes

    def weights_saved(self, layer: AttentionLayer) -> int:
        return layer.projections.num_weights()

    def install(self, site: Site) -> None:
        rows = site.stub(True, True)
        site.hook(LayerView, (self.action.source, self.action.source), rows)
