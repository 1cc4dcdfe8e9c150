"""Measure what the calibration windows say of the layers, before any map is scored.

The `Calibration` of a command calls both functions, and `ranking` orders pairs of layers by what
they return.

*Layer means* are every layer's keys and values, averaged over the windows. KVSharer ranks pairs by
them (30 windows of 64 tokens). *Block errors* say how far a layer's output moves when this layer
alone reads the keys and values of another layer. On SmolLM2, Spearman's rho with the KL of the pair
is 0.95 for block errors and -0.04 for the paper's distance of means (RESULTS.md, 80 of 435 pairs).

KVSharer §3.1, https://arxiv.org/abs/2410.18517.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from kvsharer_exp.measure.batch_size import halving_batches
from kvsharer_exp.model.devices import input_device
from kvsharer_exp.model.sharing.architectures import attention_layers, may_share
from kvsharer_exp.model.sharing.runtime import install
from kvsharer_exp.values.finite import NotFiniteError
from kvsharer_exp.values.sharing_map import SharingMap


@dataclass(frozen=True, slots=True)
class LayerMeans:
    """Mean keys and values per layer, each (num_key_value_heads, window_tokens, head_dim), float32.

    They are taken as the cache holds them: after RoPE, and before heads are repeated for grouped
    queries.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    num_windows: int


@torch.inference_mode()
@halving_batches
def layer_means(model: nn.Module, windows: torch.Tensor, *, batch_size: int = 8) -> LayerMeans:
    """Average every layer's KV over all of ``windows`` (num_windows, window_tokens).

    Raises:
        NotFiniteError: a layer's keys or values overflow in the model's dtype.
    """
    layers = attention_layers(model)
    identity = SharingMap.identity(len(layers))
    device = input_device(model)
    keys: list[torch.Tensor | int] = [0] * len(layers)
    values: list[torch.Tensor | int] = [0] * len(layers)
    for batch in windows.split(batch_size):
        with install(layers, [identity], keep=True) as states:
            model.base_model(batch.to(device), use_cache=False)  # type: ignore[operator]
        for index, handed in states.items():
            key, value, _ = handed[None]
            keys[index] += key.float().sum(0).cpu()
            values[index] += value.float().sum(0).cpu()
    for kind, totals in (("keys", keys), ("values", values)):
        for index, total in enumerate(totals):
            if not torch.as_tensor(total).isfinite().all():
                raise NotFiniteError(
                    f"the {kind} of layer {index} are not finite on the calibration text: "
                    "try model.dtype=bfloat16 or float32"
                )
    return LayerMeans(
        tuple(total / len(windows) for total in keys),  # type: ignore[misc]
        tuple(total / len(windows) for total in values),  # type: ignore[misc]
        len(windows),
    )


@torch.inference_mode()
@halving_batches
def block_errors(
    model: nn.Module, windows: torch.Tensor, *, batch_size: int = 8
) -> list[list[float]]:
    """Measure the error that sharing each pair of layers alone leaves in the target's block.

    ``matrix[target][source]`` is the relative squared error in the output of the target's block,
    ‖changed - own‖² / ‖own‖², mean over tokens and ``windows`` (num_windows, window_tokens). It is
    NaN where the pair may not share. Every block before the target sees what it sees in the full
    model, so a pair costs the forward of one block. A pair that overflows in the model's dtype has
    an infinite error, which is not the same as NaN.
    """
    layers = attention_layers(model)
    identity = SharingMap.identity(len(layers))
    device = input_device(model)
    totals = [[0.0 if may_share(t, s) else math.nan for s in layers] for t in layers]
    for batch in windows.split(batch_size):
        calls: dict[int, tuple[Any, Any, Any]] = {}
        with ExitStack() as undo:
            for layer in layers:
                hook = partial(remember, calls, layer.index)
                handle = layer.block.register_forward_hook(hook, with_kwargs=True)
                undo.callback(handle.remove)
            with install(layers, [identity], keep=True) as states:
                model.base_model(batch.to(device), use_cache=False)  # type: ignore[operator]
        for target in layers:
            args, kwargs, returned = calls[target.index]
            own = output_of(returned)
            for source in layers:
                if not may_share(target, source):
                    continue
                pair = identity.share(target.index, source.index)
                handed = {source.index: states[source.index]}
                with install(layers, [pair], handed=handed, keep=True):
                    changed = output_of(target.block(*args, **kwargs))
                error = (changed - own).square().sum(-1) / own.square().sum(-1)
                total = error.mean(-1).sum().item()
                totals[target.index][source.index] += total if math.isfinite(total) else math.inf
    return [[total / len(windows) for total in row] for row in totals]


def remember(
    calls: dict[int, tuple[Any, Any, Any]], index: int, block: nn.Module, *call: Any
) -> None:
    """Keep a block's ``call``: the args and kwargs it was given, and what it returned."""
    args, kwargs, returned = call
    calls[index] = args, kwargs, returned


def output_of(returned: Any) -> torch.Tensor:
    """The hidden states (batch, tokens, hidden_size) in what a block returned, float32."""
    return (returned[0] if isinstance(returned, tuple) else returned).float()
