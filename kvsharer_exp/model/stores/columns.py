"""What the queries of one forward may read of a layer that does not hold all tokens as they were.

A query of a quantised owner reads the stored keys of all earlier groups, and the full keys of its
own group. So the attention gets two stretches of columns: the tokens of complete groups as they are
stored, and the tokens that were not stored before this forward in full. Most tokens of a long
prefill stand in both, and the mask says which of the two a query sees. Where only the first and the
recent tokens are held, the first ones have columns of their own, in front of the others. Attention
itself needs no change.

The stores beside this file call `grouped_columns` and `window_columns` before each forward of their
attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of keys for an attention.

    Attributes:
        index: for every column its token, counted from the first token that the unchanged attention
            would have been given: (rows, columns), rows is 1 when all rows of the batch are alike.
        visible: (rows, query heads or 1, queries, columns), without what the model's mask hides.
        places: for every column where its value is among those of the store, (1, columns) or as
            ``index``; None: every column's value is at its own place.
        first_slot, end_slot: the stored groups that come first, after sinks with own columns.
    """

    index: torch.Tensor
    visible: torch.Tensor
    places: torch.Tensor | None = None
    first_slot: int = 0
    end_slot: int = 0

    def rows_of(self, part: int, parts: int) -> Columns:
        """Those of one of equal ``parts`` of the batch."""
        return self._changed(lambda held: held.chunk(parts)[part] if len(held) > 1 else held)

    def repeated(self, times: int) -> Columns:
        """Those of ``times`` as many rows, the same ones again and again."""
        return self._changed(
            lambda held: held.repeat(times, *[1] * (held.ndim - 1)) if len(held) > 1 else held
        )

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Columns:
        places = None if self.places is None else change(self.places)
        return replace(self, index=change(self.index), visible=change(self.visible), places=places)

    def values(self, values: torch.Tensor) -> torch.Tensor:
        """Take from ``values`` (batch, heads, places, head_dim) the value of every column."""
        if self.places is None:
            return values
        if len(self.places) == 1:
            return values.index_select(2, self.places[0])
        places = self.places[:, None, :, None].expand(*values.shape[:2], -1, values.shape[-1])
        return values.gather(2, places)

    def mask(self, mask: torch.Tensor | None, additive: bool, dtype: torch.dtype) -> torch.Tensor:
        """The mask (batch, 1, queries, columns) for ``mask`` (…, queries, tokens) of the model.

        ``additive``: it is added to the products of attention, as the eager attention does.
        """
        visible = self.visible
        if mask is not None:
            rows, heads, queries, _ = mask.shape
            index = self.index[:, None, None, :]
            rows = max(rows, len(index))
            seen = mask.expand(rows, -1, -1, -1).gather(-1, index.expand(rows, heads, queries, -1))
            if seen.dtype == torch.bool:
                visible = visible & seen
            else:
                return torch.where(visible, seen, torch.finfo(seen.dtype).min)
        if not additive:
            return visible
        zeros = torch.zeros((), dtype=dtype, device=visible.device)
        return zeros.masked_fill(~visible, torch.finfo(dtype).min)


def grouped_columns(
    group: int,
    *,
    past: int,
    queries: int,
    offset: int,
    first_slot: int,
    waiting: int,
    pads: torch.Tensor,
    first_value: int,
    sinks: int = 0,
    recent: int | None = None,
) -> Columns:
    """Lay out the columns of a forward of ``queries`` tokens after ``past`` tokens.

    Args:
        offset: the first token that the unchanged attention would be given.
        first_slot: the first group that is still stored.
        waiting: the first token whose key is not stored in all rows.
        pads: (rows,) padding tokens before each row's first real token; groups begin after them.
        first_value: the first token that has a value in the store, sinks aside.
        sinks: first tokens with columns of their own; they are in the first group.
        recent: the tokens that a query reads beside them, itself among them; None: all.
    """
    device, total = pads.device, past + queries
    end_slot = max(first_slot, int((total - 1 - pads.min()).item()) // group)
    stored = torch.arange(first_slot * group, end_slot * group, device=device)
    first = torch.arange(sinks, device=device)
    fresh = torch.arange(waiting, total, device=device).expand(len(pads), -1)
    pads = pads[:, None]
    tokens = torch.cat([first + pads, stored + pads, fresh], 1)
    query = torch.arange(past, total, device=device)
    own = (query - pads).div(group, rounding_mode="floor")[:, :, None]
    of_first = (own >= 1).expand(-1, -1, sinks)  # before that they wait with their group
    earlier = ((stored // group)[None, None, :] < own) & (stored >= sinks)
    of_own = (fresh - pads).div(group, rounding_mode="floor")[:, None, :] == own
    of_own = of_own & (fresh[:, None, :] <= query[None, :, None])
    if recent is not None:
        begin = query[None, :, None] - recent
        earlier = earlier & ((stored + pads)[:, None, :] > begin)
        is_first = (fresh - pads < sinks)[:, None, :]
        of_own = of_own & ((fresh[:, None, :] > begin) | is_first)
    visible = torch.cat([of_first, earlier, of_own], 2) & (tokens >= offset)[:, None, :]
    index = (tokens - offset).clamp(0, total - offset - 1)
    places = sinks + (tokens - first_value).clamp(0, total - first_value - 1)
    places = torch.where(tokens - pads < sinks, (tokens - pads).clamp(0), places)
    return Columns(index, visible.unsqueeze(1), places, first_slot, end_slot)


def window_columns(
    sinks: int,
    recent: int,
    *,
    past: int,
    queries: int,
    offset: int,
    apart: int,
    first: int,
    pads: torch.Tensor,
) -> Columns:
    """Lay out the columns of a forward where ``sinks`` and ``recent`` tokens are read.

    Args:
        past, queries, offset, pads: as of `grouped_columns`.
        apart: how many columns in front hold the sinks of each row; 0 while nothing was dropped.
        first: the first token of the other columns.
    """
    device, total = pads.device, past + queries
    others = torch.arange(first, total, device=device).expand(len(pads), -1)
    query = torch.arange(past, total, device=device)[None, :, None]
    pads = pads[:, None]
    front = torch.arange(apart, device=device) + pads
    of_first = (front < past)[:, None, :].expand(-1, queries, -1)
    is_first, token = (others - pads < sinks)[:, None, :], others[:, None, :]
    read = (token <= query) & ((token > query - recent) | is_first)
    if apart:
        read = read & ~(is_first & (token < past))
    tokens = torch.cat([front, others], 1)
    visible = torch.cat([of_first, read], 2) & (tokens >= offset)[:, None, :]
    return Columns((tokens - offset).clamp(0, total - offset - 1), visible.unsqueeze(1))
