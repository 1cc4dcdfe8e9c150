"""What the queries of one forward may read of a quantised owner.

A query reads the stored keys of all earlier groups, and the full keys of its own group. So the
attention gets two stretches of columns: the tokens of complete groups as they are stored, and the
tokens that were not stored before this forward in full. Most tokens of a long prefill stand in
both, and the mask says which of the two a query sees. Attention itself needs no change.

A `layer.PackedLayer` calls `make_columns` before each forward of its attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of keys for an attention.

    Attributes:
        index: for every column its token, counted from the first token that the unchanged attention
            would have been given: (rows, columns), rows is 1 when all rows of the batch are alike.
        visible: (rows, queries, columns), without what the model's own mask hides.
        first_slot, end_slot: the stored groups that come first.
    """

    index: torch.Tensor
    visible: torch.Tensor
    first_slot: int
    end_slot: int

    def values(self, values: torch.Tensor) -> torch.Tensor:
        """Take from ``values`` (batch, heads, tokens, head_dim) the value of every column."""
        if len(self.index) == 1:
            return values.index_select(2, self.index[0])
        index = self.index[:, None, :, None].expand(*values.shape[:2], -1, values.shape[-1])
        return values.gather(2, index)

    def mask(self, mask: torch.Tensor | None, additive: bool, dtype: torch.dtype) -> torch.Tensor:
        """The mask (batch, 1, queries, columns) for ``mask`` (…, queries, tokens) of the model.

        ``additive``: it is added to the products of attention, as the eager attention does.
        """
        visible = self.visible.unsqueeze(1)
        if mask is not None:
            rows, heads, queries, _ = mask.shape
            index = self.index[:, None, None, :]
            rows = max(rows, len(index))
            seen = mask.expand(rows, -1, -1, -1).gather(-1, index.expand(rows, heads, queries, -1))
            if seen.dtype == torch.bool:
                visible = visible & seen
            else:
                return seen.masked_fill(~visible, torch.finfo(seen.dtype).min)
        if not additive:
            return visible
        zeros = torch.zeros((), dtype=dtype, device=visible.device)
        return zeros.masked_fill(~visible, torch.finfo(dtype).min)


def make_columns(
    group: int,
    *,
    past: int,
    queries: int,
    offset: int,
    first_slot: int,
    waiting: int,
    pads: torch.Tensor,
) -> Columns:
    """Lay out the columns of a forward of ``queries`` tokens after ``past`` tokens.

    Args:
        offset: the first token that the unchanged attention would be given.
        first_slot: the first group that is still stored.
        waiting: the first token that is not stored in all rows.
        pads: (rows,) padding tokens before each row's first real token; groups begin after them.
    """
    device, total = pads.device, past + queries
    end_slot = max(first_slot, int((total - 1 - pads.min()).item()) // group)
    stored = torch.arange(first_slot * group, end_slot * group, device=device)
    fresh = torch.arange(waiting, total, device=device).expand(len(pads), -1)
    pads = pads[:, None]
    tokens = torch.cat([stored + pads, fresh], 1)
    query = torch.arange(past, total, device=device)
    own = (query - pads).div(group, rounding_mode="floor")[:, :, None]
    earlier = (stored // group)[None, None, :] < own
    of_own = (fresh - pads).div(group, rounding_mode="floor")[:, None, :] == own
    of_own = of_own & (fresh[:, None, :] <= query[None, :, None])
    visible = torch.cat([earlier, of_own], 2) & (tokens >= offset)[:, None, :]
    index = (tokens - offset).clamp(0, total - offset - 1)
    return Columns(index, visible, first_slot, end_slot)
