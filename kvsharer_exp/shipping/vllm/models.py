"""vLLM's own models, put under the plan of an export.

For every family there is a class, ``KVSharedLlamaForCausalLM`` and so on, made when vLLM asks for
it by name. It builds vLLM's model and then changes the layers that the plan changes. A target reads
the KV blocks of its source. A stand-in replaces its attention, and is taken out of the register
from which vLLM allocates KV.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear
from vllm.model_executor.models.utils import extract_layer_index

from kvsharer_exp.shipping.exported_config import ARCHITECTURE_PREFIX
from kvsharer_exp.shipping.vllm.layers import QueryRows, StandIn
from kvsharer_exp.shipping.vllm.translate import engine_plan
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.vllm_support import FAMILIES

logger = init_logger("vllm.kvsharer_exp")  # vLLM shows what is below its own name


def __getattr__(name: str) -> type:
    family = FAMILIES.get(name.removeprefix(ARCHITECTURE_PREFIX))
    if family is None or not name.startswith(ARCHITECTURE_PREFIX):
        raise AttributeError(name)
    return _planned(name, family.vllm)


@cache
def _planned(name: str, path: str) -> type:
    """The class ``name``: that of vLLM at ``path``, under the plan of its configuration."""
    module, _, stock = path.partition(":")
    base = getattr(import_module(f"vllm.model_executor.models.{module}"), stock)
    return type(name, (Planned, base), {"__module__": __name__})


class Planned:
    """Mixed into a model class of vLLM: the plan of ``hf_config`` is in force."""

    # A low-rank adapter would look for the projections that targets and stand-ins do not have, and
    # a target could be on another stage of the pipeline than its source.
    supports_lora = False
    supports_pp = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
        config = vllm_config.model_config.hf_config
        plan = engine_plan(config.to_dict())
        _check_engine(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)  # type: ignore[call-arg]
        norms = getattr(config, "kv_plan_norms", None) or {}
        _install(self, vllm_config, plan, {int(layer): norm for layer, norm in norms.items()})

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load as vLLM does, and refuse a checkpoint that leaves a part of a weight unfilled.

        Raises:
            ValueError: the message names the weight. vLLM itself misses only whole parameters.
        """
        names: set[str] = set()

        def noted() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                names.add(name)
                yield name, weight

        loaded = super().load_weights(noted())  # type: ignore[misc]
        model: Any = self
        _check_whole(model, names)
        # Later vLLM may repack weights for the device, and they are no parameters then.
        self.loaded_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        logger.info("kvsharer_exp: %d bytes of parameters under the plan", self.loaded_bytes)
        return loaded


def _check_engine(vllm_config: VllmConfig) -> None:
    if vllm_config.quant_config is not None:
        raise ValueError(
            "kvsharer_exp: vLLM runs a plan with unquantised weights only; export the model in "
            "bfloat16 and serve it without quantization"
        )
    if str(vllm_config.cache_config.cache_dtype).startswith(("fp8", "int8", "nvfp4")):
        raise ValueError(
            f"kvsharer_exp: kv_cache_dtype={vllm_config.cache_config.cache_dtype} is not what the "
            "plan was scored with; leave it at auto"
        )


def _install(model: Any, vllm_config: VllmConfig, plan: KVPlan, norms: dict[int, str]) -> None:
    register = vllm_config.compilation_config.static_forward_context
    hidden = vllm_config.model_config.hf_text_config.hidden_size
    modules = dict(model.named_modules())
    inner = {name: module for name, module in modules.items() if isinstance(module, Attention)}
    if len(inner) != plan.num_layers:
        raise ValueError(
            f"kvsharer_exp: the plan has {plan.num_layers} layers, the model {len(inner)}; export "
            "it again"
        )
    by_layer = {extract_layer_index(name): module for name, module in inner.items()}
    for name, attention in inner.items():
        layer = extract_layer_index(name)
        source = plan.key_sources[layer]
        outer, _, _ = name.rpartition(".")  # the module with the projections
        if source == layer:
            continue
        if source is not None:
            _read(modules[outer], attention, by_layer[source].layer_name)
            continue
        action = plan.actions[layer]
        block_name, _, place = outer.rpartition(".")
        setattr(modules[block_name], place, StandIn(hidden, action.name))
        del register[attention.layer_name]
        if layer in norms:
            setattr(modules[block_name], norms[layer], nn.Identity())


def _read(outer: nn.Module, attention: Attention, source: str) -> None:
    """Let ``attention`` read the KV of the layer named ``source``, and project queries only."""
    attention.kv_sharing_target_layer_name = source
    attention.impl.kv_sharing_target_layer_name = source
    for name, projection in list(outer.named_children()):
        if isinstance(projection, QKVParallelLinear):
            setattr(outer, name, QueryRows(projection))


def _check_whole(model: Any, names: set[str]) -> None:
    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    for name, module in model.named_modules():
        if not isinstance(module, (QKVParallelLinear, MergedColumnParallelLinear)):
            continue
        parent, _, leaf = name.rpartition(".")
        for parameter, _ in module.named_parameters(recurse=False):
            wanted = [f"{parent}.{part}.{parameter}" for part in packed.get(leaf, ())]
            missing = [part for part in wanted if part not in names]
            if missing and f"{name}.{parameter}" not in names:
                raise ValueError(
                    f"kvsharer_exp: the checkpoint lacks {missing[0]}; export it again"
                )
