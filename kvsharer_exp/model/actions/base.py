"""What runs an action in a model: the protocol of the classes beside this file.

Every action of ``values/actions/`` names its runner. `connect` installs runners, `check_plan` asks
them whether they fit, and `footprint` asks them for bytes. To add an action, write its value, its
runner, and the action's line in ``values/actions/registry.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvsharer_exp.model.fitted_plan import Fit
from kvsharer_exp.model.moments import Moments
from kvsharer_exp.model.sharing.architectures import AttentionLayer
from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.model.sharing.site import Site


@dataclass(frozen=True)
class ActionRunner:
    """Runs one ``action``. It holds no part of any model: a layer is given to it.

    ``counts_tokens``: it needs to know which tokens are padding.
    """

    action: Any
    counts_tokens: ClassVar[bool] = False

    def check(self, layer: AttentionLayer, layers: tuple[AttentionLayer, ...]) -> None:
        """Refuse the action at ``layer`` if it cannot be done there.

        Raises:
            SharingError: names the layer and the reason.
        """

    def check_fit(self, layer: AttentionLayer, fit: Fit) -> None:
        """Refuse a ``fit`` that is not one of ``layer``; the errors are those of `check`."""

    def kv_bytes(
        self, layer: AttentionLayer, context: int, size: int, prompt: int | None = None
    ) -> int:
        """Bytes that the layer keeps of a sequence of ``context`` tokens.

        ``size``: bytes of a number that is not quantised. ``prompt``: how many of the tokens were
        the prompt; None: all.
        """
        return 0

    def tokens_read(self, layer: AttentionLayer, context: int) -> int:
        """How many of ``context`` tokens the next one reads where it reads the layer's own KV."""
        return context - layer.first_read(context)

    def parameter_bytes(self, layer: AttentionLayer) -> int:
        """Bytes of parameters that the layer does without, less those that it needs instead."""
        return 0

    def weights_saved(self, layer: AttentionLayer) -> int:
        """How many numbers a token is not multiplied with, less those that it is with instead."""
        return 0

    def fit(self, fitted: Moments, held: Moments) -> dict[str, torch.Tensor]:
        """The numbers of a stand-in, from the moments of two parts of the calibration text.

        What has to be chosen is chosen on ``held``.
        """
        raise NotImplementedError(f"{self.action.name} needs no fit")

    def install(self, site: Site) -> None:
        """Change the model at ``site`` so that the layer does the action."""
        raise NotImplementedError


def check_source(layer: AttentionLayer, source: AttentionLayer) -> None:
    """Refuse that ``layer`` reads keys or values of ``source`` if they cannot be read there.

    Raises:
        SharingError: they differ in KV shape or attention type. The message names both layers.
    """
    if layer.kv_shape != source.kv_shape:
        raise SharingError(
            f"layer {layer.index} cannot read layer {source.index}: their KV shapes differ "
            f"(heads, key and value features {layer.kv_shape} and {source.kv_shape}), "
            "choose another"
        )
    if layer.attention_type != source.attention_type:
        raise SharingError(
            f"layer {layer.index} cannot read layer {source.index}: {layer.attention_type} "
            f"against {source.attention_type}; choose a source of the same attention type"
        )
