"""The KV of all tokens in 16 bits, as `Store` lays it out: what `snap` holds of a prompt."""

from __future__ import annotations

import torch

from kvsharer_exp.model.stores.base import Store
from kvsharer_exp.model.stores.columns import ListedColumns


class FullLayer(Store):
    """Keeps the keys and values of one layer as they are, and never lets one go."""

    parts = ("keys", "values")

    def reset(self) -> None:
        super().reset()
        self.keys: torch.Tensor | None = None  # (batch, heads, tokens, head_dim)
        self.values: torch.Tensor | None = None

    def lay_out(self, queries: int, pads: torch.Tensor) -> ListedColumns:
        past = self.cumulative_length
        index = torch.arange(past + queries, device=pads.device)[None]
        visible = (index >= pads[:, None])[:, None, None, :] & causal(past, queries, pads.device)
        return ListedColumns(index, visible)

    def store(
        self, keys: torch.Tensor, values: torch.Tensor, past: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], 2)
            values = torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values
        return keys, values


def causal(past: int, queries: int, device: torch.device) -> torch.Tensor:
    """(queries, past + queries): which tokens come no later than a query after ``past`` others."""
    tokens = torch.arange(past + queries, device=device)
    return tokens <= tokens[past:, None]
