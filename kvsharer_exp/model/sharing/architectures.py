"""Find the decoder layers of a model that can share their KV, without naming architectures.

Whatever runs, ranks or scores plans gets its layers from `attention_layers`, and `check_plan` tells
whether a plan fits them.

A layer can share when its attention module has a ``layer_idx``, receives the cache as an argument,
and projects keys and values in a way that `projections` knows. Every transformers model that is
built like this works without a line of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from kvsharer_exp.model.sharing.projections import Projections, SharingError, find_projections
from kvsharer_exp.model.sharing.stand_in import StandIn

# What transformers calls the cache argument of an attention module's forward.
MASK = "attention_mask"
_CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")
# The architectures that pass every test of the contract; tests/tiny.py holds the same list. Any
# other model that is built the same way is accepted too.
WORKING = (
    "llama mistral mixtral qwen2 qwen3 qwen3_moe gemma2 gemma3_text olmo2 phi phi3 stablelm "
    "granite cohere smollm3 glm4 starcoder2 internlm3 olmo gpt2 gpt_neox"
)
_LATENT_KV = ("kv_b_proj", "kv_a_proj_with_mqa")  # multi-head latent attention (deepseek)


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One decoder layer: where its attention is, and what it caches per token.

    The ``decoder`` is the module that runs the blocks one after the other. ``name`` is that of the
    attention in its block. ``window`` is that of a sliding layer, in tokens.
    ``attention_type`` is what transformers calls it: ``full_attention``, ``sliding_attention``, ….
    """

    index: int
    decoder: nn.Module
    block: nn.Module
    name: str
    attention: nn.Module
    cache_argument: str
    cache_position: int
    mask_position: int
    projections: Projections
    attention_type: str
    window: int | None
    hidden_size: int

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """(num_key_value_heads, key features, value features); features are KV heads × head_dim."""
        own = self.projections
        return own.num_key_value_heads, own.key_features, own.value_features

    def projection(self, name: str) -> nn.Module:
        return self.attention.get_submodule(name)

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in, its keys and values too.

        The weights of the attention tell; where they are quantised, be it to 8-bit floats, the
        vectors of the block do: biases, and the norms' weights.
        """
        vectors = (weight for weight in self.block.parameters() if weight.ndim == 1)
        for weight in chain(islice(self.attention.parameters(), 1), vectors):
            if weight.dtype.is_floating_point and weight.dtype.itemsize >= 2:
                return weight.dtype
        return torch.get_default_dtype()

    @property
    def element_size(self) -> int:
        """Bytes of one number of this layer's keys and values."""
        return self.dtype.itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that this layer's keys and values take per cached token, in the model's dtype."""
        own = self.projections
        return (own.key_features + own.value_features) * self.element_size

    def first_read(self, context: int) -> int:
        """The first of ``context`` tokens that the next token may read: 0 but for a window."""
        return 0 if self.window is None else max(0, context - self.window + 1)

    @property
    def kv_parameter_bytes(self) -> int:
        """Bytes of the weights and biases that make this layer's keys and values."""
        return self.projections.parameter_bytes()


def attention_layers(model: nn.Module) -> tuple[AttentionLayer, ...]:
    """Return the decoder layers of ``model`` in order, one `AttentionLayer` per layer.

    Raises:
        SharingError: the model has no such layers or only some (hybrid), and the message lists
            models that work; or the model shares KV by training already.
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
        if not isinstance(index, int) or index in found:
            continue
        cache_argument = _cache_argument(type(module).forward)
        projections = find_projections(module, config) if cache_argument else None
        if cache_argument is None or projections is None:
            continue
        found[index] = AttentionLayer(
            index=index,
            decoder=_decoder(modules, name),
            block=modules[name.rpartition(".")[0]],
            name=name.rpartition(".")[2],
            attention=module,
            cache_argument=cache_argument[0],
            cache_position=cache_argument[1],
            mask_position=cache_argument[2],
            projections=projections,
            attention_type=types[index] if 0 <= index < len(types) else "",
            window=_window(config, types[index]) if 0 <= index < len(types) else None,
            hidden_size=config.hidden_size,
        )
    reason = _why_not(config, modules, types, sorted(found) == list(range(num_layers)))
    if reason and any(isinstance(module, StandIn) for module in modules.values()):
        raise SharingError(
            "the model runs under a plan already: leave that apply_plan block first, "
            "or load the original (make_plan is for good)"
        )
    if reason:
        name = config.model_type[:24]
        some = WORKING[:80].rpartition(" ")[0]
        raise SharingError(
            f"{name} cannot share KV ({reason}). Works: {some}; README lists all of them"
        )
    return tuple(found[index] for index in range(num_layers))


def _decoder(modules: dict[str, nn.Module], attention: str) -> nn.Module:
    """Find the module above the block of ``attention`` that is no mere list of blocks."""
    name = attention.rpartition(".")[0].rpartition(".")[0]
    while name and isinstance(modules[name], nn.ModuleList):
        name = name.rpartition(".")[0]
    return modules[name]


@cache
def _cache_argument(forward: Callable[..., Any]) -> tuple[str, int, int] | None:
    """Find the cache argument of ``forward``: its name, its position and that of the mask.

    Kept: inspecting is slow.
    """
    arguments = list(inspect.signature(forward).parameters)[1:]
    name = next((a for a in _CACHE_ARGUMENTS if a in arguments), None)
    if name is None:
        return None
    mask = arguments.index(MASK) if MASK in arguments else len(arguments)
    return name, arguments.index(name), mask


def _window(config: Any, attention_type: str) -> int | None:
    """The sliding window of a layer, as transformers' caches take it from ``config``."""
    if attention_type == "chunked_attention":
        return getattr(config, "attention_chunk_size", None)
    if attention_type != "full_attention" or not getattr(config, "layer_types", None):
        return getattr(config, "sliding_window", None)
    return None


def _why_not(config: Any, modules: dict[str, nn.Module], types: list[str], complete: bool) -> str:
    """Say in a word why this model cannot share; empty when it can."""
    if config.is_encoder_decoder:
        return "seq2seq"
    if any("attention" not in kind or kind.startswith("linear") for kind in types):
        return "recurrent"
    if any(name.rpartition(".")[2] in _LATENT_KV for name in modules):
        return "latent KV"
    return "" if complete else "attention"


def may_share(target: AttentionLayer, source: AttentionLayer) -> bool:
    """Whether ``target`` can read ``source``: an earlier one of its KV shape and attention type."""
    return (
        source.index < target.index
        and source.kv_shape == target.kv_shape
        and source.attention_type == target.attention_type
    )
