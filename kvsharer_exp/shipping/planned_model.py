"""A causal language model that runs under a KV plan: what each layer does about its KV.

``kvsharer export`` writes this file beside the weights, with the model's own class in the line
marked below, and with it the modules of kvsharer_exp that run plans. transformers loads the model
from them, and nothing but torch and transformers is needed.

config.json says in ``kv_plan`` what each layer does, one text a layer, joined by ``_``. At layer 5,
``5`` keeps its keys and values, ``5q4`` keeps them in 4 bits, ``2`` reads those of layer 2, and
``2k3v`` reads the keys of layer 2 and the values of layer 3. Attention is left out by ``x``. A
constant stands in for it by ``c``, and a linear map by ``a``. ``kv_plan_norms`` says by layer which
norm such a stand-in replaces as well.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM as StockForCausalLM  # the class of this model

from kvsharer_exp.model.actions.registry import runner_of
from kvsharer_exp.model.actions.stand_in import StandInRunner
from kvsharer_exp.model.fitted_plan import Fit, FittedPlan
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.connect import connect
from kvsharer_exp.model.sharing.exchange import EachThread
from kvsharer_exp.model.sharing.projections import QueryRows, SharingError
from kvsharer_exp.shipping.exported_config import REFUSAL, KVSharedConfig
from kvsharer_exp.values.plan import KVPlan


class KVPlanForCausalLM(StockForCausalLM):
    """The stock model with ``config.kv_plan`` in force."""

    config_class = KVSharedConfig

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say no: weights are read like the stock class's, and renamed where those are renamed."""
        return False

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Refuse engines, which ask whether they may put their own attention and cache in."""
        raise ValueError(REFUSAL)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        plan = KVPlan.parse(config.kv_plan)
        hidden = config.get_text_config(decoder=True).hidden_size
        norms = getattr(config, "kv_plan_norms", None) or {}
        install_plan(self, FittedPlan(plan, empty_fits(plan, hidden, norms)))


# transformers looks up some renamings of weights by the name of the class. A model that is loaded
# and saved again names its class by that name too, so the class must be found under both.
KVPlanForCausalLM.__name__ = StockForCausalLM.__name__
globals()[StockForCausalLM.__name__] = KVPlanForCausalLM


def empty_fits(plan: KVPlan, hidden: int, norms: dict[str, str]) -> dict[int, Fit]:
    """Fits of zeros for the stand-ins of ``plan``, which the weights of a file replace."""
    shapes = {"weight": (hidden, hidden), "bias": (hidden,)}
    fits = {}
    for layer, action in enumerate(plan.actions):
        runner = runner_of(action)
        norm = norms.get(str(layer))
        if isinstance(runner, StandInRunner) and (action.fitted or norm):
            tensors = {name: torch.zeros(shapes[name], device="cpu") for name in runner.tensors}
            fits[layer] = Fit(tensors, norm)
    return fits


def install_plan(model: nn.Module, fitted: FittedPlan) -> None:
    """Put ``fitted`` into a new ``model``, whose weights may have no memory yet (meta tensors).

    Raises:
        SharingError: the numbers of layers differ.
    """
    without = any(parameter.is_meta for parameter in model.parameters())
    if without:
        _lend_memory(model)
    layers = attention_layers(model)
    if fitted.plan.num_layers != len(layers):
        raise SharingError(
            f"plan has {fitted.plan.num_layers} layers but the model has {len(layers)}: "
            "give one action per layer"
        )
    connect(layers, [fitted], EachThread(), ExitStack())  # nobody closes the stack: it is for good
    for module in model.modules():
        if isinstance(module, QueryRows) and not without:
            module.own()
        if without:
            for name, held in module._parameters.items():
                if held is not None and not held.is_meta:
                    module._parameters[name] = nn.Parameter(
                        torch.empty(held.shape, dtype=held.dtype, device="meta"), held.requires_grad
                    )


def _lend_memory(model: nn.Module) -> None:
    """Give the weights of attentions one number of memory, repeated.

    `attention_layers` takes a fused projection without memory for one that is offloaded, of which
    the rows of the queries could not be taken.
    """
    for attention in list(model.modules()):
        if getattr(attention, "layer_idx", None) is None:
            continue
        for module in attention.modules():
            for name, held in module._parameters.items():
                if held is not None and held.is_meta:
                    number = torch.zeros((), dtype=held.dtype, device="cpu")
                    module._parameters[name] = nn.Parameter(
                        number.expand(held.shape), held.requires_grad
                    )
