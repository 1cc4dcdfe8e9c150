"""The columns of a quantised owner, which the `packed` store gives to its attention.

A query reads the stored keys of all earlier groups, and the full keys of its own group. So there
are two stretches of columns: the tokens of complete groups as they are stored, and the tokens that
were not stored before this forward in full. Most tokens of a long prefill stand in both, and each
query reads them in one. Where only the first and the recent tokens are held, the first ones have
columns of their own, in front of the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvsharer_exp.model.stores.columns import RuledColumns


@dataclass(frozen=True, slots=True)
class GroupedColumns(RuledColumns):
    """Sinks with columns of their own, stored tokens, and fresh ones, in this order.

    Attributes:
        group: how many tokens are quantised together.
        first_slot, end_slot: the stored groups that have columns.
        waiting: the first of the fresh tokens.
        sinks: first tokens with columns of their own; they are in the first group.
        recent: the tokens that a query reads beside them, itself among them; None: all.
    """

    group: int
    first_slot: int
    end_slot: int
    waiting: int
    sinks: int
    recent: int | None

    @property
    def _stored(self) -> int:
        """The columns of stored tokens."""
        return (self.end_slot - self.first_slot) * self.group

    def rule(
        self,
        query: torch.Tensor,
        token: torch.Tensor,
        pads: torch.Tensor,
        columns: torch.Tensor,
    ) -> torch.Tensor:
        fresh, real = columns >= self.sinks + self._stored, token - pads
        own = (query - pads).div(self.group, rounding_mode="floor")
        of = real.div(self.group, rounding_mode="floor")
        in_own_group = (of == own) & (token <= query)
        earlier = of < own
        if self.recent is not None:
            is_recent, is_first = token > query - self.recent, real < self.sinks
            in_own_group = in_own_group & (is_recent | is_first)
            # Sinks that are stored have columns of their own.
            earlier = earlier & torch.where(columns < self.sinks, is_first, is_recent & ~is_first)
        return torch.where(fresh, in_own_group, earlier)

    def reach(self, first: int, end: int) -> torch.Tensor:
        device, group = self.tokens.device, self.group
        most, least = int(self.pads.max()), int(self.pads.min())
        begin, stop = self.past + first, self.past + end
        first_slot = self.first_slot
        if self.recent is not None:
            first_slot = max(first_slot, (begin - self.recent + 1 - most) // group)
        end_slot = max(first_slot, min(self.end_slot, (stop - 1 - least) // group))
        # The own group of the first query begins less than a group before it, in every row.
        fresh = max(self.waiting, begin - group + 1)
        behind = self.sinks + self._stored
        return torch.cat(
            [
                torch.arange(self.sinks, device=device),
                self.sinks
                + torch.arange(
                    (first_slot - self.first_slot) * group,
                    (end_slot - self.first_slot) * group,
                    device=device,
                ),
                behind + torch.arange(fresh - self.waiting, stop - self.waiting, device=device),
            ]
        )


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
) -> GroupedColumns:
    """Lay out the columns of a forward of ``queries`` tokens after ``past`` tokens.

    Args:
        offset: the first token that the unchanged attention would be given.
        first_slot: the first group that is still stored.
        waiting: the first token whose key is not stored in all rows.
        pads: (rows,) padding tokens before each row's first real token; groups begin after them.
        first_value: the first token that has a value in the store, sinks aside.
        sinks, recent: as of `GroupedColumns`.
    """
    device, total = pads.device, past + queries
    end_slot = max(first_slot, int((total - 1 - pads.min()).item()) // group)
    stored = torch.arange(first_slot * group, end_slot * group, device=device)
    first = torch.arange(sinks, device=device)
    fresh = torch.arange(waiting, total, device=device).expand(len(pads), -1)
    pads = pads[:, None]
    tokens = torch.cat([first + pads, stored + pads, fresh], 1)
    places = sinks + (tokens - first_value).clamp(0, total - first_value - 1)
    return GroupedColumns(
        index=(tokens - offset).clamp(0, total - offset - 1),
        places=torch.where(tokens - pads < sinks, (tokens - pads).clamp(0), places),
        tokens=tokens,
        pads=pads,
        past=past,
        queries=queries,
        offset=offset,
        group=group,
        first_slot=first_slot,
        end_slot=end_slot,
        waiting=waiting,
        sinks=sinks,
        recent=recent,
    )
