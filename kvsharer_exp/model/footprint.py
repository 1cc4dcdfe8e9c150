"""The memory of a plan: predicted from shapes, and counted on a cache that exists.

``sweep``, ``evaluate``, ``export``, ``bench`` and ``ablate`` predict the memory of their plans
here. ``evaluate`` and ``export`` also count it after a prefill.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kvsharer_exp.model.actions.sizes import (
    attention_flops,
    kv_bytes,
    kv_fraction,
    parameter_bytes_saved,
)
from kvsharer_exp.model.devices import input_device
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.cache import cache_bytes
from kvsharer_exp.model.sharing.runtime import apply_plan
from kvsharer_exp.values.footprint import Footprint, MeasuredFootprint
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap

CONTEXT = 4096
"""The number of tokens at which memory is compared, where nothing else is said."""


def footprint(model: nn.Module, plan: KVPlan | SharingMap, *, context: int = CONTEXT) -> Footprint:
    """Predict the memory of ``plan`` from the shapes in ``model``, for one sequence of ``context``.

    That is the bytes that a cache holds, their fraction of the full cache's (both counted in 16
    bits where they are not quantised), the bytes of the parameters that the plan does without, and
    the FLOPs of attention for the next token.
    """
    layers, plan = attention_layers(model), KVPlan.of(plan)
    held = kv_bytes(plan, layers, context)
    per_token = held // context if held % context == 0 else held / context
    return Footprint(
        per_token,
        kv_fraction(plan, layers, context),
        parameter_bytes_saved(plan, layers),
        context=context,
        kv_bytes=held,
        attention_flops=attention_flops(
            plan, layers, context, text_config(model).num_attention_heads
        ),
    )


def text_config(model: nn.Module) -> Any:
    """The configuration that the decoder layers follow."""
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


def max_positions(model: nn.Module) -> int | None:
    """The most tokens that the model can read; None if its configuration does not say it."""
    return getattr(text_config(model), "max_position_embeddings", None)


@torch.inference_mode()
def measured_footprint(
    model: nn.Module, plan: FittedPlan | KVPlan | SharingMap, tokens: torch.Tensor
) -> MeasuredFootprint:
    """Run a prefill of ``tokens`` (batch, sequence) and count the bytes the cache then holds."""
    device = input_device(model)
    with apply_plan(model, FittedPlan.of(plan)):
        output = model.base_model(tokens.to(device), use_cache=True)  # type: ignore[operator]
    return MeasuredFootprint(cache_bytes(output.past_key_values), tokens.numel())
