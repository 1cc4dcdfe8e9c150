"""What the queries of one forward may read of a layer that does not hold all tokens as they were.

An attention is given one column of keys for each token. A store that lets tokens go, or quantises
them, gives it other columns, and says which of them each query may read. The rules are computed for
some queries and columns at a time: a whole mask of a long prefill is as large as its attention
weights, and most of it says no.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of keys for an attention. The rows of tensors are those of the batch, 1 if all alike.

    Attributes:
        index: for every column its token, counted from the first token that the unchanged attention
            would have been given: (rows, columns).
        places: for every column where its value is among those of the store, as ``index``; None:
            every column's value is at its own place.
    """

    index: torch.Tensor
    places: torch.Tensor | None = field(default=None, kw_only=True)

    def visible(
        self, first: int = 0, end: int | None = None, columns: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the queries from ``first`` to ``end`` may read of ``columns`` (count,), None: all.

        Returns (rows, query heads or 1, queries, count), without what the model's mask hides.
        """
        raise NotImplementedError

    def reach(self, first: int, end: int) -> torch.Tensor:
        """The columns (count,) that some query from ``first`` to ``end`` may read, in order.

        There is at least one, and there may be some that none of them reads.
        """
        raise NotImplementedError

    def rows_of(self, part: int, parts: int) -> Self:
        """Those of one of equal ``parts`` of the batch."""
        return self._changed(lambda held: held.chunk(parts)[part])

    def repeated(self, times: int) -> Self:
        """Those of ``times`` as many rows, the same ones again and again."""
        return self._changed(lambda held: held.repeat(times, *[1] * (held.ndim - 1)))

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        held = {one.name: getattr(self, one.name) for one in fields(self)}
        tensors = {n: t for n, t in held.items() if isinstance(t, torch.Tensor) and len(t) > 1}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is held."""
        held = (getattr(self, one.name) for one in fields(self))
        return [one for one in held if isinstance(one, torch.Tensor)]

    def values(self, values: torch.Tensor) -> torch.Tensor:
        """Take from ``values`` (batch, heads, places, head_dim) the value of every column."""
        if self.places is None:
            return values
        if len(self.places) == 1:
            return values.index_select(2, self.places[0])
        places = self.places[:, None, :, None].expand(*values.shape[:2], -1, values.shape[-1])
        return values.gather(2, places)

    def mask(
        self,
        mask: torch.Tensor | None,
        additive: bool,
        dtype: torch.dtype,
        *,
        first: int = 0,
        end: int | None = None,
        columns: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mask (batch, 1, queries, columns) for ``mask`` (…, queries, tokens) of the model.

        ``additive``: it is added to the products of attention, as the eager attention does. The
        others as of `visible`.
        """
        visible = self.visible(first, end, columns)
        if mask is not None:
            mask = mask[:, :, first:end]
            index = self.index if columns is None else self.index[:, columns]
            rows, heads, queries, _ = mask.shape
            rows, index = max(rows, len(index)), index[:, None, None, :]
            seen = mask.expand(rows, -1, -1, -1).gather(-1, index.expand(rows, heads, queries, -1))
            if seen.dtype == torch.bool:
                visible = visible & seen
            else:
                return torch.where(visible, seen, torch.finfo(seen.dtype).min)
        if not additive:
            return visible
        zeros = torch.zeros((), dtype=dtype, device=visible.device)
        return zeros.masked_fill(~visible, torch.finfo(dtype).min)


@dataclass(frozen=True, slots=True)
class ListedColumns(Columns):
    """Columns whose rule is a tensor, ``read`` (rows, query heads or 1, queries, columns)."""

    read: torch.Tensor

    def visible(
        self, first: int = 0, end: int | None = None, columns: torch.Tensor | None = None
    ) -> torch.Tensor:
        read = self.read[:, :, first:end]
        return read if columns is None else read.index_select(-1, columns)

    def reach(self, first: int, end: int) -> torch.Tensor:
        some = self.visible(first, end).flatten(0, -2).any(0).nonzero()[:, 0]
        return some if len(some) else torch.zeros(1, dtype=torch.long, device=some.device)


@dataclass(frozen=True, slots=True)
class ColumnsAfterPrompt(Columns):
    """The columns of a prompt, which its queries read, and then those that later queries read.

    Attributes:
        prompt: the tokens of the prompt, each with its column.
        past: how many of them came before this forward.
        read: (rows, query heads or 1, later queries, later columns).
    """

    prompt: int
    past: int
    read: torch.Tensor

    def visible(
        self, first: int = 0, end: int | None = None, columns: torch.Tensor | None = None
    ) -> torch.Tensor:
        device, here = self.read.device, self.prompt - self.past
        if columns is None:
            columns = torch.arange(self.index.shape[1], device=device)
        end = here + self.read.shape[2] if end is None else end
        ours = columns < self.prompt
        query = self.past + torch.arange(first, max(first, min(end, here)), device=device)
        of_prompt = ours & (columns <= query[:, None])
        later = self.read[:, :, max(first - here, 0) : max(end - here, 0)]
        later = later.index_select(-1, (columns - self.prompt).clamp(min=0)) & ~ours
        return torch.cat([of_prompt.expand(*later.shape[:2], -1, -1), later], 2)

    def reach(self, first: int, end: int) -> torch.Tensor:
        device, here = self.read.device, self.prompt - self.past
        before = self.past + min(end, here) if first < here else 0
        later = self.read[:, :, max(first - here, 0) : max(end - here, 0)]
        later = later.flatten(0, -2).any(0).nonzero()[:, 0]
        return torch.cat([torch.arange(before, device=device), self.prompt + later])


@dataclass(frozen=True, slots=True)
class RuledColumns(Columns):
    """Columns whose rule is computed from their tokens.

    Attributes:
        tokens: (rows, columns), counted from the first of the text, padding included.
        pads: (rows, 1), the padding tokens before each row's first real token.
        past, queries: how many tokens came before this forward, and in it.
        offset: the first token that the unchanged attention would have been given.
    """

    tokens: torch.Tensor
    pads: torch.Tensor
    past: int
    queries: int
    offset: int

    def visible(
        self, first: int = 0, end: int | None = None, columns: torch.Tensor | None = None
    ) -> torch.Tensor:
        device = self.tokens.device
        if columns is None:
            columns = torch.arange(self.tokens.shape[1], device=device)
        end = self.queries if end is None else end
        query = torch.arange(self.past + first, self.past + end, device=device)
        tokens = self.tokens[:, columns]
        read = self.rule(query[None, :, None], tokens[:, None, :], self.pads[:, :, None], columns)
        return (read & (tokens >= self.offset)[:, None, :])[:, None]

    def rule(
        self,
        query: torch.Tensor,
        token: torch.Tensor,
        pads: torch.Tensor,
        columns: torch.Tensor,
    ) -> torch.Tensor:
        """Whether a ``query`` (1, queries, 1) may read a ``token`` (rows, 1, count) in its column.

        ``pads`` (rows, 1, 1); ``columns`` (count,). The result is (rows, queries, count).
        """
        raise NotImplementedError
