"""Predict the memory and speed of a map beside the full cache, from the shapes alone.

The commands ``bench`` and ``ablate`` put the prediction next to what `benchmark` measures. The
bytes of KV and of weights are exact. The speed-ups hold where only the bytes moved (decode) or the
FLOPs (prefill) count. What the kernels, threads and caches of the machine make of them is for
`benchmark` to measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from kvsharer_exp.model.sharing.architectures import AttentionLayer, attention_layers
from kvsharer_exp.values.sharing_map import SharingMap


def predict(
    model: nn.Module, sharing_map: SharingMap, *, batch: int, context: int
) -> dict[str, Any]:
    """Predict from the shapes alone, for ``batch`` sequences with ``context`` cached tokens each.

    ``kv_bytes`` are exact.

    ``decode_speedup`` is the ratio of the bytes moved per step. These are the weights once, every
    layer's KV for its attention (targets read KV too), and what `DynamicCache` copies to append
    one token (all that an owner holds, read and written).

    ``prefill_speedup`` is the ratio of the FLOPs. Every weight of a layer is counted once per
    token, though a mixture of experts uses fewer.
    """
    layers = attention_layers(model)
    targets = sharing_map.targets
    held = [batch * kv_bytes_per_sequence(layer, context) for layer in layers]
    shared = sum(held[owner] for owner in sharing_map.owners)
    features = sum(sum(layers[target].kv_shape[1:]) for target in targets)
    hidden = text_config(model).hidden_size
    weights = _bytes(model) - _untied_embedding_bytes(model)
    weights_saved = sum(layers[target].kv_parameter_bytes for target in targets)
    copied = {"full": 2 * sum(held), "shared": 2 * shared}
    moved = weights + sum(held) + copied["full"]
    moved_shared = weights - weights_saved + sum(held) + copied["shared"]
    tokens = batch * context
    flops = _prefill_flops(model, layers, batch, context)
    flops_saved = 2 * hidden * features * tokens
    return {
        "kv_bytes": {"full": sum(held), "shared": shared},
        "kv_fraction": shared / sum(held),
        "kv_projection_flops_saved_per_token": 2 * hidden * features,
        "kv_projection_flops_saved_in_prefill": flops_saved,
        "kv_weight_bytes_saved": weights_saved,
        "attention_read_bytes_per_step": {"full": sum(held), "shared": sum(held)},
        "concatenation_bytes_per_step": copied,
        "decode_speedup": moved / moved_shared,
        "prefill_speedup": flops / (flops - flops_saved),
    }


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


def text_config(model: nn.Module) -> Any:
    """The configuration that the decoder layers follow."""
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


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
    """Count 2 FLOPs per weight and token, and the causal half of the products of attention.

    These products are queries × keys and weights × values.
    """
    heads = text_config(model).num_attention_heads
    weights = sum(p.numel() for layer in layers for p in layer.block.parameters())
    per_head = sum(
        sum(layer.kv_shape[1:]) // layer.kv_shape[0] for layer in layers
    )  # head_dim of keys and of values
    return 2 * weights * batch * context + heads * per_head * batch * context**2
