"""Runs the stand-ins: actions that put a module in place of an attention.

``drop``, ``constant`` and ``affine`` differ in what the module adds to the hidden states.
"""

from __future__ import annotations

from typing import ClassVar

from kvsharer_exp.model.actions.base import ActionRunner
from kvsharer_exp.model.branch import branches_of, check_stand_in
from kvsharer_exp.model.devices import device_of
from kvsharer_exp.model.fitted_plan import Fit
from kvsharer_exp.model.sharing.architectures import AttentionLayer
from kvsharer_exp.model.sharing.projections import SharingError, num_weights
from kvsharer_exp.model.sharing.site import Site
from kvsharer_exp.model.sharing.stand_in import StandIn


class StandInRunner(ActionRunner):
    """Base of their runners; ``tensors`` names what their fits hold."""

    tensors: ClassVar[tuple[str, ...]] = ()

    def check(self, layer: AttentionLayer, layers: tuple[AttentionLayer, ...]) -> None:
        check_stand_in(branches_of(layers)[layer.index])

    def check_fit(self, layer: AttentionLayer, fit: Fit) -> None:
        sizes = [fit.tensors[name].numel() for name in self.tensors if name in fit.tensors]
        whole = sum(sizes) == self.parameters_needed(layer.hidden_size)
        if not whole or not (fit.norm is None or hasattr(layer.block, fit.norm)):
            raise SharingError(
                f"layer {layer.index}: its fit is one of another model: make it for this one, "
                "with fit_plan(model, plan, windows)"
            )

    def parameters_needed(self, hidden_size: int) -> int:
        """How many numbers the stand-in has."""
        return 0

    def parameter_bytes(self, layer: AttentionLayer) -> int:
        held = list(layer.attention.parameters())
        saved = sum(p.numel() * p.element_size() for p in held)
        return saved - self.parameters_needed(layer.hidden_size) * layer.element_size

    def weights_saved(self, layer: AttentionLayer) -> int:
        return num_weights(layer.attention) - self.parameters_needed(layer.hidden_size)

    def install(self, site: Site) -> None:
        layer, fit = site.layer, site.fit
        held = {} if fit is None else {name: fit.tensors[name] for name in self.tensors}
        device = device_of(layer.attention)
        held = {name: tensor.to(device, layer.dtype) for name, tensor in held.items()}
        stand_in = StandIn(layer.index, layer.cache_argument, layer.cache_position, **held)
        site.replace(stand_in, None if fit is None else fit.norm)
