"""Tiny random models of many architectures: 6 layers, for contracts only."""

import copy
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvsharer_exp.model.sharing.architectures import attention_layers, may_share
from kvsharer_exp.model.sharing.permanent import make_shared
from kvsharer_exp.model.sharing.runtime import share_kv
from kvsharer_exp.values.sharing_map import SharingMap

NUM_LAYERS = 6
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALTERNATING = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)

# Every one of these passes the whole contract; add an architecture by adding a line.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 16, "sliding_window": 8, "layer_types": ALTERNATING},
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "num_key_value_heads": 1,
            "sliding_window": 8,
            "layer_types": ALTERNATING,
        },
    ),
    "olmo": ("OlmoConfig", {"clip_qkv": 0.5}),  # clamps its projections in place
    "olmo2": ("Olmo2Config", {}),
    "phi": ("PhiConfig", {}),
    "stablelm": ("StableLmConfig", {}),
    "granite": ("GraniteConfig", {}),
    "cohere": ("CohereConfig", {}),
    "smollm3": ("SmolLM3Config", {}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "starcoder2": ("Starcoder2Config", {}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "experts_implementation": "eager",  # grouped matmul has no float64
        },
    ),
    "internlm3": ("InternLM3Config", {"head_dim": 16}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {"num_key_value_heads": None}),
    "gpt_neox": ("GPTNeoXConfig", {"num_key_value_heads": None}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "experts_implementation": "eager"}),
}

# One of each way to be built; the others of the contract run with `make slow`.
_QUICKLY = ("llama", "gemma2", "gemma3_text", "qwen3", "olmo2", "gpt_neox")


def contract_architectures(quickly: Sequence[str] = _QUICKLY) -> list[Any]:
    """All architectures as parameters of a fixture; those that are not ``quickly`` are slow."""
    slow = pytest.mark.slow
    return [n if n in quickly else pytest.param(n, marks=slow) for n in ARCHITECTURES]


# Its eager attention adds two masks of the smallest number, which overflows in float64.
ONLY_FLOAT32 = {"gemma2"}


@cache
def tiny_model(name: str, **changes: Any) -> PreTrainedModel:
    """The random model ``name``, the same weights every time; shared, so leave it as it is."""
    class_name, options = ARCHITECTURES[name]
    config = getattr(transformers, class_name)(**{**SMALL, **options, **changes})
    torch.manual_seed(0)
    # float64 so that ways of computing the same thing can be told from ways that differ.
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    if name not in ONLY_FLOAT32:
        model.double()
    with torch.no_grad():
        # Random weights of the usual size give nearly uniform logits: make layers matter.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.generation_config.pad_token_id = 0
    return model


def tokens(batch: int = 2, length: int = 20, seed: int = 0) -> torch.Tensor:
    """Token ids (batch, length), none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SMALL["vocab_size"], (batch, length), generator=generator)


def some_map(model: PreTrainedModel, num_shared: int = 2) -> SharingMap:
    """Share ``num_shared`` layers of ``model``, the last of them trailing, all with one source."""
    layers = attention_layers(model)
    sharing_map = SharingMap.identity(len(layers))
    for target in reversed(layers):
        source = next((s for s in layers if may_share(target, s)), None)
        if source is not None and len(sharing_map.targets) < num_shared:
            sharing_map = sharing_map.share(target.index, source.index)
    return sharing_map


@contextmanager
def running(
    model: PreTrainedModel, sharing_map: SharingMap, form: str = "context"
) -> Iterator[PreTrainedModel]:
    """``model`` under ``sharing_map`` by `share_kv`, or (``permanent``) a copy by `make_shared`."""
    if form == "permanent":
        yield make_shared(copy.deepcopy(model), sharing_map)
    else:
        with share_kv(model, sharing_map):
            yield model


@contextmanager
def room_for(model: PreTrainedModel, most: int) -> Iterator[list[int]]:
    """Inside, memory runs out for more than ``most`` rows at once; gives the numbers tried."""
    tried: list[int] = []

    def check(_: object, args: tuple, kwargs: dict[str, Any]) -> None:
        tried.append(len(args[0] if args else kwargs["input_ids"]))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    handle = model.base_model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        with patch.object(gc, "collect"):  # it takes a second with all that the tests import
            yield tried
    finally:
        handle.remove()


def hooks(model: PreTrainedModel) -> dict[str, tuple]:
    """What hangs on every module: its forward hooks and a forward of its own, if any."""
    return {
        name: (
            tuple(module._forward_pre_hooks.values()),
            tuple(module._forward_hooks.values()),
            module.__dict__.get("forward"),
        )
        for name, module in model.named_modules()
    }
