"""The memory of a map: predicted from shapes, and counted on a cache that exists.

``sweep``, ``evaluate``, ``export``, ``bench`` and ``ablate`` predict the memory of their maps here.
``evaluate`` and ``export`` also count it after a prefill.
"""

from __future__ import annotations

import torch
from torch import nn

from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.cache import cache_bytes
from kvsharer_exp.model.sharing.runtime import share_kv
from kvsharer_exp.values.footprint import Footprint, MeasuredFootprint
from kvsharer_exp.values.sharing_map import SharingMap


def footprint(model: nn.Module, sharing_map: SharingMap) -> Footprint:
    """Predict the memory of ``sharing_map`` from the shapes in ``model``.

    That is the KV bytes per token of the owners, the same as a fraction of all layers' KV bytes,
    and the bytes of the projections that targets drop.
    """
    layers = attention_layers(model)
    kept = sum(layers[owner].kv_bytes_per_token for owner in sharing_map.owners)
    full = sum(layer.kv_bytes_per_token for layer in layers)
    saved = sum(layers[target].kv_parameter_bytes for target in sharing_map.targets)
    return Footprint(kept, kept / full, saved)


@torch.inference_mode()
def measured_footprint(
    model: nn.Module, sharing_map: SharingMap, tokens: torch.Tensor
) -> MeasuredFootprint:
    """Run a prefill of ``tokens`` (batch, sequence) and count the bytes the cache then holds."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    with share_kv(model, sharing_map):
        output = model.base_model(tokens.to(device), use_cache=True)  # type: ignore[operator]
    return MeasuredFootprint(cache_bytes(output.past_key_values), tokens.numel())
