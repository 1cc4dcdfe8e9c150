"""Let the view of a layer see the queries of its attention, and change what these read.

A cache is given keys and values, but some keeps choose tokens by the queries. Every attention that
works here looks its attention function up by the name in its config. `observe` gives the attention
a config of its own that names `observed_attention`, which asks the view and then does as before.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from kvsharer_exp.model.sharing.exchange import Exchange, KeyValue
from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.model.stores.weights import Queries

NAME = f"{__name__}.observed"
_LOOKUP, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"


class ObservedConfig:
    """The ``config`` of one attention, as it is but for the name of the attention function."""

    _attn_implementation = NAME

    def __init__(self, config: Any, layer: int, exchange: Exchange) -> None:
        self.observed, self.layer, self.exchange = config, layer, exchange

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "observed" not in vars(self):  # while it is being copied
            raise AttributeError(name)
        return getattr(self.observed, name)


def own_config(module: nn.Module) -> Any:
    """The config of an attention as the model has it."""
    config = module.config
    return config.observed if isinstance(config, ObservedConfig) else config


def observe(module: nn.Module, layer: int, exchange: Exchange) -> ObservedConfig:
    """The config that lets the view of ``layer`` see the queries of the attention ``module``.

    Raises:
        SharingError: the attention does not look its attention function up.
    """
    if not {_LOOKUP, _EAGER} <= _globals(module).keys():
        raise SharingError(
            f"layer {layer} ({type(module).__name__}) shows its queries to nobody: give it a "
            "window (w4+252) or all tokens"
        )
    return ObservedConfig(own_config(module), layer, exchange)


def observed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> Any:
    """The attention function of an `ObservedConfig`."""
    observed: Any = module.config
    kind = observed.observed._attn_implementation
    view = observed.exchange.here().views.get(observed.layer)
    if view is not None:
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        queries = Queries(query, scaling, options.get("softcap"))
        read = KeyValue(key, value)
        seen = view.watch(observed.layer, queries, read)
        if seen is not read:
            key, value, columns = seen
            value = columns.values(value)
            attention_mask = columns.mask(attention_mask, kind == "eager", query.dtype)
    known = _globals(module)
    attend = known[_LOOKUP].get_interface(kind, known[_EAGER])
    return attend(module, query, key, value, attention_mask, **options)


def _globals(module: nn.Module) -> dict[str, Any]:
    """The names that the forward of ``module`` can use."""
    return inspect.unwrap(type(module).forward).__globals__


AttentionInterface.register(NAME, observed_attention)
