"""The module that stands in place of an attention, for the actions drop, constant and affine.

`site.Site.replace` puts it where the attention was, so that the attention neither runs nor needs
its weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kvsharer_exp.model.sharing.cache import vacate
from kvsharer_exp.model.sharing.projections import SharingError


class StandIn(nn.Module):
    """Maps the input of an attention to what it adds: ``weight`` · input + ``bias``.

    Args:
        layer: the index of the layer, which is empty in the cache.
        cache_argument, cache_position: where the attention is given the cache.
        weight: (hidden, hidden), or None when the output does not depend on the input.
        bias: (hidden,), or None when nothing is added.
    """

    def __init__(
        self,
        layer: int,
        cache_argument: str,
        cache_position: int,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.cache_argument, self.cache_position = layer, cache_argument, cache_position
        self.weight = None if weight is None else nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """(batch, tokens, hidden) becomes the same shape; there are no attention weights."""
        if kwargs.get("cache") is not None:
            raise SharingError(
                "continuous batching stores every layer's KV by itself: "
                "a plan cannot be honoured there, use generate"
            )
        at = self.cache_position - 1
        cache = args[at] if len(args) > at else kwargs.get(self.cache_argument)
        vacate(cache, self.layer)
        if self.weight is None and self.bias is None:
            return torch.zeros_like(hidden_states), None
        bias = None if self.bias is None else self.bias.to(hidden_states)
        if self.weight is not None:
            output = nn.functional.linear(hidden_states, self.weight.to(hidden_states), bias)
            return output, None
        assert bias is not None
        return bias.expand_as(hidden_states), None
