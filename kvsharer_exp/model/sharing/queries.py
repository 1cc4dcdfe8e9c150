"""Let the view of a layer see the queries of its attention, and say what these read.

A cache is given keys and values, but some keeps choose tokens by the queries. Nearly every
attention looks its attention function up by the name in its config. `observe` gives the attention a
config of its own that names `observed_attention`, which asks the view and then does as before.
Where the view has columns of its own, a long forward attends in blocks of queries, each with only
those columns that it may read. So what a plan hides costs no time, just as causal attention spends
none on what comes later.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from kvsharer_exp.model.sharing.exchange import Exchange, KeyValue
from kvsharer_exp.model.stores.weights import Queries

NAME = f"{__name__}.observed"
_LOOKUP, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"

BLOCK = 256
"""Queries that attend at once where the view has columns of its own."""


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


def observe(module: nn.Module, layer: int, exchange: Exchange) -> ObservedConfig | None:
    """The config that lets the view of ``layer`` see the queries of the attention ``module``.

    None if the attention does not look its attention function up.
    """
    if not {_LOOKUP, _EAGER} <= _globals(module).keys():
        return None
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
    known = _globals(module)
    attend = partial(known[_LOOKUP].get_interface(kind, known[_EAGER]), module)
    view = observed.exchange.here().views.get(observed.layer)
    if view is None:
        return attend(query, key, value, attention_mask, **options)
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries = Queries(query, scaling, options.get("softcap"))
    key, value, columns = view.watch(observed.layer, queries, KeyValue(key, value, view.laid_out))
    if columns is None:
        return attend(query, key, value, attention_mask, **options)
    if kind == "eager" or query.shape[2] <= BLOCK:  # eager attention returns the weights too
        mask = columns.mask(attention_mask, kind == "eager", query.dtype)
        return attend(query, key, value, mask, **options)
    outputs = []
    for first in range(0, query.shape[2], BLOCK):
        end = min(first + BLOCK, query.shape[2])
        read = columns.reach(first, end)
        mask = columns.mask(attention_mask, False, query.dtype, first=first, end=end, columns=read)
        held = (one.index_select(2, read) for one in (key, value))
        outputs.append(attend(query[:, :, first:end], *held, mask, **options)[0])
    return torch.cat(outputs, 1), None


def _globals(module: nn.Module) -> dict[str, Any]:
    """The names that the forward of ``module`` can use."""
    return inspect.unwrap(type(module).forward).__globals__


AttentionInterface.register(NAME, observed_attention)
