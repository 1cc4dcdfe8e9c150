"""Predict the memory and speed of a plan beside the full cache, from the shapes alone.

The commands ``bench`` and ``ablate`` put the prediction next to what `benchmark` measures. The
bytes of KV and of weights are exact. The speed-ups hold where only the bytes moved (decode) or the
FLOPs (prefill) count. What the kernels, threads and caches of the machine make of them is for
`benchmark` to measure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from kvsharer_exp.model.actions.registry import runner_of
from kvsharer_exp.model.actions.sizes import kv_bytes, parameter_bytes_saved
from kvsharer_exp.model.footprint import text_config
from kvsharer_exp.model.sharing.architectures import AttentionLayer, attention_layers
from kvsharer_exp.model.sharing.projections import num_weights
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap


def predict(
    model: nn.Module,
    plan: KVPlan | SharingMap,
    *,
    batch: int,
    context: int,
    new_tokens: int = 0,
) -> dict[str, Any]:
    """Predict from the shapes alone, for ``batch`` sequences with ``context`` cached tokens each.

    ``kv_bytes`` are those of a cache that holds ``new_tokens`` behind such a prompt. They are
    exact, and so are the bytes of the parameters saved: K/V projections of layers that read, and
    attentions of stand-ins less what these have instead.

    ``decode_speedup`` is the ratio of the bytes moved per step. These are the weights once, the KV
    that each attention reads (readers read KV too, stand-ins none), what the cache copies to append
    one token (all that an owner holds, read and written), and of quantised layers the codes that
    are read and the numbers that are written out for attention.

    ``prefill_speedup`` is the ratio of the FLOPs. Every weight of a layer is counted once per
    token, though a mixture of experts uses fewer.
    """
    layers, plan = attention_layers(model), KVPlan.of(plan)
    everything = KVPlan.full(plan.num_layers)
    full, kept = (batch * kv_bytes(p, layers, context) for p in (everything, plan))
    in_the_end = {
        side: batch * kv_bytes(p, layers, context + new_tokens, prompt=context)
        for side, p in (("full", everything), ("shared", plan))
    }
    hidden = text_config(model).hidden_size
    weights = _bytes(model) - _untied_embedding_bytes(model)
    saved = parameter_bytes_saved(plan, layers)
    reads = {
        side: batch * sum(_read(p, layers, context))
        for side, p in (("full", everything), ("shared", plan))
    }
    copied = {"full": 2 * full, "shared": 2 * kept}
    moved = weights + reads["full"] + copied["full"]
    decoded = batch * sum(_decoded(plan, layers, context))
    moved_shared = weights - saved + reads["shared"] + copied["shared"] + decoded
    tokens = batch * context
    features = sum(_features_not_made(plan, layers))
    flops = _prefill_flops(model, layers, batch, context)
    flops_saved = 2 * hidden * features * tokens
    flops_saved += _stand_in_flops_saved(model, plan, layers, batch, context)
    return {
        "kv_bytes": in_the_end,
        "kv_fraction": in_the_end["shared"] / in_the_end["full"],
        "kv_projection_flops_saved_per_token": 2 * hidden * features,
        "kv_projection_flops_saved_in_prefill": 2 * hidden * features * tokens,
        "flops_saved_in_prefill": flops_saved,
        "kv_weight_bytes_saved": saved,
        "attention_read_bytes_per_step": reads,
        "concatenation_bytes_per_step": copied,
        "dequantisation_bytes_per_step": {"full": 0, "shared": decoded},
        "decode_speedup": moved / moved_shared,
        "prefill_speedup": flops / (flops - flops_saved),
    }


def _read(plan: KVPlan, layers: Sequence[AttentionLayer], context: int) -> Iterator[int]:
    """The bytes of one sequence that the attention of each layer reads, keys and values apart."""
    for half, sources in enumerate((plan.key_sources, plan.value_sources), start=1):
        for source in sources:
            if source is not None:
                layer = layers[source]
                tokens = runner_of(plan.actions[source]).tokens_read(layer, context)
                yield tokens * layer.kv_shape[half] * layer.element_size


def _decoded(plan: KVPlan, layers: Sequence[AttentionLayer], context: int) -> Iterator[int]:
    """The bytes of one sequence that each quantised layer reads in codes and writes out in full."""
    for layer, action in zip(layers, plan.actions, strict=True):
        if getattr(action, "quantised", False):
            yield runner_of(action).kv_bytes(layer, context, layer.element_size)
            yield runner_of(action).tokens_read(layer, context) * layer.kv_bytes_per_token


def _features_not_made(plan: KVPlan, layers: Sequence[AttentionLayer]) -> Iterator[int]:
    """Key and value features that layers do not compute because they read those of another."""
    for layer, key, value in zip(layers, plan.key_sources, plan.value_sources, strict=True):
        _, keys, values = layer.kv_shape
        yield 0 if key in (None, layer.index) else keys
        yield 0 if value in (None, layer.index) else values


def _stand_in_flops_saved(
    model: nn.Module, plan: KVPlan, layers: Sequence[AttentionLayer], batch: int, context: int
) -> int:
    """FLOPs of the attentions that stand-ins replace, less those of the stand-ins."""
    saved = 0
    for layer, action, source in zip(layers, plan.actions, plan.key_sources, strict=True):
        if source is None:
            saved += 2 * runner_of(action).weights_saved(layer) * batch * context
            saved += _products(model, layer) * batch * context**2
    return saved


def kv_bytes_per_sequence(layer: AttentionLayer, context: int) -> int:
    """Bytes that a `DynamicCache` keeps of ``context`` tokens in one layer.

    A sliding layer keeps at most one token fewer than its window.
    """
    return layer.kv_bytes_per_token * (context - layer.first_read(context))


def calculate(
    model: nn.Module, num_shared: int, *, batch: int, context: int, memory_bytes: int
) -> dict[str, Any]:
    """Calculate what sharing any ``num_shared`` layers would save; exact if all layers are alike.

    If they are not (sliding and full), a target is taken to be the average layer, and ``exact`` is
    false. ``largest_batch`` is the number of sequences whose KV fits ``memory_bytes`` beside the
    weights. The shared model holds fewer weights (`make_shared`, ``export``). Activations are not
    counted.
    """
    layers = attention_layers(model)
    per_layer = [kv_bytes_per_sequence(layer, context) for layer in layers]
    weights = [layer.kv_parameter_bytes for layer in layers]
    kept = 1 - num_shared / len(layers)
    full, weights_saved = sum(per_layer), round(sum(weights) * (1 - kept))
    shared = round(full * kept)
    total = _bytes(model)
    return {
        "num_shared": num_shared,
        "kv_bytes": {"full": batch * full, "shared": batch * shared},
        "kv_bytes_saved": batch * (full - shared),
        "kv_weight_bytes_saved": weights_saved,
        "largest_batch": {
            "full": largest_batch(memory_bytes, total, full),
            "shared": largest_batch(memory_bytes, total - weights_saved, shared),
        },
        "exact": len(set(per_layer)) == len(set(weights)) == 1,
    }


def largest_batch(memory_bytes: int, weight_bytes: int, kv_bytes: int) -> int:
    """Count the sequences of ``kv_bytes`` each that fit beside the weights; 0 if not one does."""
    return max(0, memory_bytes - weight_bytes) // kv_bytes


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _untied_embedding_bytes(model: nn.Module) -> int:
    """Bytes of the input embedding, or 0 if it is the output matrix too.

    Of any other embedding, a step reads one row per sequence.
    """
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    return 0 if head is not None and head.weight is table else table.numel() * table.element_size()


def _prefill_flops(
    model: nn.Module, layers: Sequence[AttentionLayer], batch: int, context: int
) -> int:
    """Count 2 FLOPs per weight and token, and the causal half of the products of attention."""
    weights = sum(num_weights(layer.block) for layer in layers)
    products = sum(_products(model, layer) for layer in layers)
    return 2 * weights * batch * context + products * batch * context**2


def _products(model: nn.Module, layer: AttentionLayer) -> int:
    """FLOPs of queries × keys and weights × values for each pair of tokens, by the causal half."""
    per_head = sum(layer.kv_shape[1:]) // layer.kv_shape[0]  # head_dim of keys and of values
    return int(text_config(model).num_attention_heads * per_head)
