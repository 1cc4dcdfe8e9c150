"""Layer means: every layer's keys and values averaged over the calibration windows.

Source: KVSharer §3.1, https://arxiv.org/abs/2410.18517 (30 windows of 64 tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from kvsharer_exp.sharing.architectures import attention_layers
from kvsharer_exp.sharing.runtime import install
from kvsharer_exp.sharing_map import SharingMap


@dataclass(frozen=True, slots=True)
class LayerMeans:
    """Mean keys and values per layer, each (num_key_value_heads, window_tokens, head_dim), float32.

    As the cache holds them: after RoPE, before heads are repeated for grouped queries.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    num_windows: int


@torch.inference_mode()
def layer_means(model: nn.Module, windows: torch.Tensor, *, batch_size: int = 8) -> LayerMeans:
    """Average every layer's KV over ``windows`` (num_windows, window_tokens); all of them count."""
    layers = attention_layers(model)
    identity = SharingMap.identity(len(layers))
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    keys: list[torch.Tensor | int] = [0] * len(layers)
    values: list[torch.Tensor | int] = [0] * len(layers)
    for batch in windows.split(batch_size):
        with install(layers, identity, keep=True) as states:
            model.base_model(batch.to(device), use_cache=False)  # type: ignore[operator]
        for index, (key, value) in states.items():
            keys[index] += key.float().sum(0).cpu()
            values[index] += value.float().sum(0).cpu()
    return LayerMeans(
        tuple(total / len(windows) for total in keys),  # type: ignore[misc]
        tuple(total / len(windows) for total in values),  # type: ignore[misc]
        len(windows),
    )
