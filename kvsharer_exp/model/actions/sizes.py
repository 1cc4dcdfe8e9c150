"""How many bytes a plan keeps and saves: sums over what the runners of its actions say."""

from __future__ import annotations

from kvsharer_exp.model.actions.registry import runner_of
from kvsharer_exp.model.sharing.architectures import AttentionLayer
from kvsharer_exp.model.sharing.projections import num_weights
from kvsharer_exp.values.plan import KVPlan

BUDGET_SIZE = 2
"""Bytes of a number in 16 bits: budgets and fractions count KV that is not quantised like this."""


def kv_bytes(
    plan: KVPlan,
    layers: tuple[AttentionLayer, ...],
    context: int,
    size: int | None = None,
    prompt: int | None = None,
) -> int:
    """Bytes that a cache holds of one sequence of ``context`` tokens.

    ``size``: bytes of a number that is not quantised; None: as the model's dtype has it.
    ``prompt``: how many of the tokens were the prompt, for keeps that mind; None: all.
    """
    return sum(
        runner_of(action).kv_bytes(layer, context, size or layer.element_size, prompt)
        for layer, action in zip(layers, plan.actions, strict=True)
    )


def kv_fraction(plan: KVPlan, layers: tuple[AttentionLayer, ...], context: int) -> float:
    """The bytes of the plan divided by those of the full cache, in 16 bits, at a context."""
    full = kv_bytes(KVPlan.full(plan.num_layers), layers, context, BUDGET_SIZE)
    return kv_bytes(plan, layers, context, BUDGET_SIZE) / full


def attention_flops(
    plan: KVPlan, layers: tuple[AttentionLayer, ...], context: int, query_heads: int
) -> int:
    """FLOPs of all attentions for one token after ``context`` others, see `Footprint`."""
    total = 0
    for layer, action, source in zip(layers, plan.actions, plan.key_sources, strict=True):
        total += 2 * (num_weights(layer.attention) - runner_of(action).weights_saved(layer))
        if source is not None:
            heads, keys, values = layer.kv_shape
            read = runner_of(plan.actions[source]).tokens_read(layers[source], context)
            total += 2 * query_heads * (keys + values) // heads * (read + 1)  # and itself
    return total


def parameter_bytes_saved(plan: KVPlan, layers: tuple[AttentionLayer, ...]) -> int:
    """Bytes of the parameters that the plan does without, less those of its stand-ins."""
    return sum(
        runner_of(action).parameter_bytes(layer)
        for layer, action in zip(layers, plan.actions, strict=True)
    )
