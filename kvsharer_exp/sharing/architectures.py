"""Find the decoder layers of a model that can share their KV, without naming architectures.

A layer takes part when its attention module has a ``layer_idx``, receives the cache as an argument
and projects keys and values by ``k_proj`` and ``v_proj``. Every transformers model built that way
(llama, mistral, qwen2, qwen3, gemma, olmo2, phi, cohere, …) works without a line of its own.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn

from kvsharer_exp.errors import InputError
from kvsharer_exp.sharing_map import SharingMap

# What transformers calls the cache argument of an attention module's forward.
_CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")
_WORKING = (
    "llama, mistral, qwen2, qwen3, gemma2, gemma3_text, olmo2, phi, stablelm, granite, cohere"
)


class SharingError(InputError):
    """A model or a map that cannot share KV; the message names the layers and the way out."""


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One decoder layer: where its attention is and what it caches per token.

    ``key_features`` and ``value_features`` are num_key_value_heads × head_dim; ``attention_type``
    is transformers' word for it (``full_attention``, ``sliding_attention``, …).
    """

    index: int
    block: nn.Module
    attention: nn.Module
    cache_argument: str
    cache_position: int
    key_features: int
    value_features: int
    num_key_value_heads: int
    attention_type: str

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        return self.num_key_value_heads, self.key_features, self.value_features

    def projection(self, name: str) -> nn.Module:
        return self.attention.get_submodule(name)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes this layer's keys and values take per cached token in the model's dtype."""
        # Of any parameter of the attention: under a map the projections are not there.
        dtype = next(self.attention.parameters()).dtype
        size = dtype.itemsize if dtype.is_floating_point else 2  # quantised weights: 16-bit KV
        return (self.key_features + self.value_features) * size

    @property
    def kv_parameter_bytes(self) -> int:
        """Bytes of the key and value projections (weights and biases)."""
        return sum(
            parameter.numel() * parameter.element_size()
            for name in ("k_proj", "v_proj")
            for parameter in self.projection(name).parameters()
        )


def attention_layers(model: nn.Module) -> tuple[AttentionLayer, ...]:
    """The decoder layers of ``model`` in order, one per layer.

    Raises:
        SharingError: the model has no such layers, or only some (hybrid, fused projections).
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    num_layers = config.num_hidden_layers
    if getattr(config, "num_kv_shared_layers", 0):
        raise SharingError(
            f"{config.model_type} already shares KV between its layers by training: "
            "choose a model where every layer owns its KV"
        )
    types = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    modules = dict(model.named_modules())
    found: dict[int, AttentionLayer] = {}
    for name, module in modules.items():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not all(
            isinstance(getattr(module, part, None), nn.Module) for part in ("k_proj", "v_proj")
        ):
            continue
        arguments = list(inspect.signature(type(module).forward).parameters)[1:]
        cache_argument = next((a for a in _CACHE_ARGUMENTS if a in arguments), None)
        if cache_argument is None or not 0 <= index < num_layers or index in found:
            continue
        key_features = module.k_proj.out_features
        head_dim = getattr(module, "head_dim", None) or key_features
        found[index] = AttentionLayer(
            index=index,
            block=modules[name.rpartition(".")[0]],
            attention=module,
            cache_argument=cache_argument,
            cache_position=arguments.index(cache_argument),
            key_features=key_features,
            value_features=module.v_proj.out_features,
            num_key_value_heads=key_features // head_dim,
            attention_type=types[index],
        )
    if sorted(found) != list(range(num_layers)):
        raise SharingError(
            f"{config.model_type} cannot share KV here: {len(found)} of its {num_layers} layers "
            f"have k_proj, v_proj and a cache argument. Works: {_WORKING}"
        )
    return tuple(found[index] for index in range(num_layers))


def may_share(target: AttentionLayer, source: AttentionLayer) -> bool:
    """Whether ``target`` can read ``source``'s KV: same shape, same kind of attention."""
    return (
        source.index < target.index
        and source.kv_shape == target.kv_shape
        and source.attention_type == target.attention_type
    )


def check_map(sharing_map: SharingMap, layers: tuple[AttentionLayer, ...]) -> None:
    """Refuse a map that does not fit the model.

    Raises:
        SharingError: another number of layers, KV shape or attention type; names both layers.
    """
    if sharing_map.num_layers != len(layers):
        raise SharingError(
            f"map has {sharing_map.num_layers} layers but the model has {len(layers)}: "
            "give one source per layer"
        )
    for target in sharing_map.targets:
        source = sharing_map.kv_source_layers[target]
        reader, owner = layers[target], layers[source]
        if reader.kv_shape != owner.kv_shape:
            raise SharingError(
                f"layer {target} cannot read layer {source}: their KV shapes differ "
                f"(heads, key and value features {reader.kv_shape} against {owner.kv_shape})"
            )
        if reader.attention_type != owner.attention_type:
            raise SharingError(
                f"layer {target} cannot read layer {source}: {reader.attention_type} against "
                f"{owner.attention_type}; choose a source of the same attention type"
            )
