"""The KV of an owner that holds its first and its most recent tokens, in 16 bits.

While nothing has been dropped, tokens lie in their order and the attention runs as it does without
a plan. Then the first tokens of each row, which padding shifts, lie in front of the recent ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvsharer_exp.model.stores.base import Store
from kvsharer_exp.model.stores.columns import Columns, RuledColumns
from kvsharer_exp.values.keeps.window import Window


@dataclass(frozen=True, slots=True)
class WindowColumns(RuledColumns):
    """The first and the recent tokens.

    Attributes:
        sinks, recent: how many first and recent tokens a query reads, itself among the recent.
        apart: how many columns in front hold the sinks of each row; 0 while nothing was dropped.
    """

    sinks: int
    recent: int
    apart: int

    def rule(
        self,
        query: torch.Tensor,
        token: torch.Tensor,
        pads: torch.Tensor,
        columns: torch.Tensor,
    ) -> torch.Tensor:
        is_first = token - pads < self.sinks
        read = (token <= query) & ((token > query - self.recent) | is_first)
        if not self.apart:
            return read
        in_front, known = columns < self.apart, token < self.past
        return torch.where(in_front, known.expand_as(read), read & ~(is_first & known))

    def reach(self, first: int, end: int) -> torch.Tensor:
        device = self.tokens.device
        begin = self.past + self.queries - (self.tokens.shape[1] - self.apart)
        recent = max(begin, self.past + first - self.recent + 1)
        sinks = min(int(self.pads.max()) + self.sinks, recent, self.past + end)
        return torch.cat(
            [
                torch.arange(max(self.apart, self.apart + sinks - begin), device=device),
                self.apart + torch.arange(recent - begin, self.past + end - begin, device=device),
            ]
        )


class WindowLayer(Store):
    """Keeps the keys and values of a `Window` of one layer."""

    parts = ("keys", "values")

    def reset(self) -> None:
        super().reset()
        assert isinstance(self.action.keep, Window)
        self._keep = self.action.keep
        self.keys: torch.Tensor | None = None  # (batch, heads, held tokens, head_dim)
        self.values: torch.Tensor | None = None
        self._apart = 0  # the columns in front that hold each row's first tokens
        self._first = 0  # the token of the first of the others

    def lay_out(self, queries: int, pads: torch.Tensor) -> Columns | None:
        past = self.cumulative_length
        if not self._drops(past + queries - 1):
            return None
        offset, total, pads = self.offset(past), past + queries, pads[:, None]
        others = torch.arange(self._first, total, device=pads.device).expand(len(pads), -1)
        front = torch.arange(self._apart, device=pads.device) + pads
        tokens = torch.cat([front, others], 1)
        return WindowColumns(
            index=(tokens - offset).clamp(0, total - offset - 1),
            tokens=tokens,
            pads=pads,
            past=past,
            queries=queries,
            offset=offset,
            sinks=self._keep.sinks,
            recent=self._keep.recent,
            apart=self._apart,
        )

    def _drops(self, seen: int) -> bool:
        """Whether the token after ``seen`` others cannot read one of them, but for the model."""
        least = min(pad for _, pad in self.rows())
        return self._keep.first_recent(seen) > least + self._keep.sinks

    def store(
        self, keys: torch.Tensor, values: torch.Tensor, past: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.lasting:
            return keys, values
        if self.keys is None or self.values is None:
            self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        every = [torch.cat(pair, 2) for pair in ((self.keys, keys), (self.values, values))]
        read = every
        if not self._drops(self.cumulative_length - 1):  # `lay_out` gave no columns
            read = [held[:, :, self.offset(past) :] for held in every]
        if self._drops(self.cumulative_length):
            every = [self._without_dropped(held, past) for held in every]
            self._apart = self._sinks_held
            self._first = self.first_held(self.cumulative_length)
        self.keys, self.values = every
        return read[0], read[1]

    @property
    def _sinks_held(self) -> int:
        """How many first tokens stay: none once the model's own window has passed them."""
        passed = self.offset(self.cumulative_length) - max(pad for _, pad in self.rows())
        return 0 if passed >= self._keep.sinks else self._keep.sinks

    def _without_dropped(self, every: torch.Tensor, past: int) -> torch.Tensor:
        """Of ``every`` token held, each row's first ones and the recent ones."""
        recent = every[:, :, self._apart + self.first_held(self.cumulative_length) - self._first :]
        if not self._sinks_held:
            return recent.clone()
        first = every.new_zeros(*every.shape[:2], self._keep.sinks, every.shape[-1])
        for rows, pad in self.rows():
            known = max(0, min(self._keep.sinks, past - pad)) if self._apart else 0
            first[rows, :, :known] = every[rows, :, :known]
            end = max(known, min(self._keep.sinks, self.cumulative_length - pad))
            begin = self._apart - self._first + pad
            first[rows, :, known:end] = every[rows, :, begin + known : begin + end]
        return torch.cat([first, recent], 2)
