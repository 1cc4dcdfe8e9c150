"""The attention weights of some queries, for keeps that choose tokens by them.

The kernels of attention give no weights, so they are computed a second time here, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Queries:
    """The queries (batch, query heads, tokens, head_dim) of one attention, after RoPE.

    ``scaling`` is what their products with keys are multiplied by, ``softcap`` the bound that some
    models put on these products.
    """

    states: torch.Tensor
    scaling: float
    softcap: float | None = None

    def cut(self, begin: int, end: int | None = None) -> Queries:
        """Those of the tokens from ``begin`` to ``end``."""
        return Queries(self.states[:, :, begin:end], self.scaling, self.softcap)


def products(queries: Queries, keys: torch.Tensor) -> torch.Tensor:
    """What attention takes the softmax of: (batch, heads, group, queries, keys).

    ``keys`` (batch, heads, keys, head_dim). ``group`` counts the query heads that read one KV head.
    """
    grouped = queries.states.unflatten(1, (keys.shape[1], -1)).float()
    found = grouped @ keys.float().unsqueeze(2).transpose(-1, -2) * queries.scaling
    if queries.softcap is not None:
        found = torch.tanh(found / queries.softcap) * queries.softcap
    return found


def softmax(products: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The weights of ``products``, of which ``hidden`` (broadcast to them) may not be read.

    A query that may read none has weights of zero.
    """
    return products.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num_(0.0)


def weights(queries: Queries, keys: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The weights of all ``queries`` at once, as of `products` and `softmax`."""
    return softmax(products(queries, keys), hidden)


def best(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Find the ``counts`` (rows,) highest of ``scores`` (rows, heads, tokens), in their order.

    Returns:
        Positions (rows, heads, largest count); -1 in front of those of a row with a smaller count.
    """
    most = int(counts.max())
    places = scores.topk(most, dim=-1).indices
    ranks = torch.arange(most, device=scores.device)
    return places.masked_fill(ranks >= counts[:, None, None], -1).sort(-1).values


def taken(held: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Take the ``places`` that `best` found from ``held`` (rows, heads, tokens, …)."""
    places = places.clamp(min=0)
    index = places.reshape(*places.shape, *[1] * (held.ndim - 3))
    return held.gather(2, index.expand(*places.shape, *held.shape[3:]))
