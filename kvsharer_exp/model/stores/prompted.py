"""What the keeps have in common that choose tokens of a prompt by the attention these get.

While the prompt comes, attention is that of the full cache: all its keys and values are held, and
the keep weighs its tokens. When it has ended, the chosen ones stay. The tokens after it read these
and each other. The prompt is the first forward, unless the plan was put in with another number of
tokens. One forward may go past its end, as scoring does without a cache: then the columns of the
prompt stand before those that later tokens read.
"""

from __future__ import annotations

from typing import Any

import torch

from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.model.stores.base import Store
from kvsharer_exp.model.stores.columns import Columns, ColumnsAfterPrompt
from kvsharer_exp.model.stores.weights import Queries

Read = tuple[torch.Tensor, torch.Tensor, Columns]
"""Keys, values and columns that an attention reads instead of what `Store.update` returned."""


class PromptedLayer(Store):
    """Base of the layers that hold what a ``prompted`` keep chooses.

    Args:
        prompt: the number of tokens of the prompt, padding included; None: the first forward.
    """

    watches = True

    def __init__(self, *args: Any, prompt: int | None = None, **options: Any) -> None:
        self.prompt = prompt
        super().__init__(*args, **options)

    def reset(self) -> None:
        super().reset()
        self.end = self.prompt  # the number of tokens of this prompt, once it is known
        self.keys: torch.Tensor | None = None  # of the prompt, until it has ended
        self.values: torch.Tensor | None = None
        self.padding = torch.zeros(1, dtype=torch.long)  # (rows,), one row if all are alike

    def lay_out(self, queries: int, pads: torch.Tensor) -> Columns | None:
        self.padding = pads
        if self.end is None:
            if not self.lasting:
                raise SharingError(
                    f"a layer keeps {self.action.keep}, which is chosen when a prompt has ended: "
                    "run with a cache, or score with scoring=long"
                )
            self.end = queries
        past = self.cumulative_length
        return None if past < self.end else self.lay_out_after(past, queries)

    def store(
        self, keys: torch.Tensor, values: torch.Tensor, past: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.end is not None
        if past >= self.end:
            return self.store_after(keys, values)
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], 2)
            values = torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values
        return keys, values

    def watch(self, queries: Queries, keys: torch.Tensor, values: torch.Tensor) -> Read | None:
        """See the queries of a forward, and the keys and values that `update` returned for them.

        Returns what attention must read instead, or None.
        """
        assert self.end is not None
        total = self.cumulative_length
        past = total - queries.states.shape[2]
        if past >= self.end:
            return self.watch_after(queries, keys, values)
        if not self.lasting and (total <= self.end or self.holds_all(total)):
            return None
        end = min(total, self.end)
        prompt = queries.cut(0, end - past)
        self.weigh(prompt, keys[:, :, :end], past)
        if total < self.end:
            return None
        self.settle(prompt, keys[:, :, :end], values[:, :, :end])
        self.keys = self.values = None
        if total == end:
            return None
        after = self.go_on(queries.cut(end - past), keys[:, :, end:], values[:, :, end:])
        return None if after is None else self._behind(keys, values, past, after)

    def _behind(self, keys: torch.Tensor, values: torch.Tensor, past: int, after: Read) -> Read:
        """Put what the tokens after the prompt read behind the prompt, which they do not read."""
        assert self.end is not None
        end, (later_keys, later_values, columns) = self.end, after
        index = torch.arange(end, device=keys.device).expand(len(columns.index), -1)
        return (
            torch.cat([keys[:, :, :end], later_keys], 2),
            torch.cat([values[:, :, :end], columns.values(later_values)], 2),
            ColumnsAfterPrompt(
                index=torch.cat([index, columns.index], 1),
                prompt=end,
                past=past,
                read=columns.visible(),
            ),
        )

    def real(self, tokens: int) -> list[int]:
        """How many of the first ``tokens`` of each row are no padding."""
        return [max(0, tokens - pad) for pad in self.padding.tolist()]

    def index_after(self, held: int, first: int, count: int) -> torch.Tensor:
        """The tokens (1, held + count) for which the model's mask is right.

        For the ``held`` columns it is the token before ``first``: every later one may read it, as
        it may read those, and it is padding only in rows that hold nothing. The others are the
        ``count`` tokens from ``first`` on.
        """
        device = self.padding.device
        last = torch.full((held,), first - 1, device=device)
        return torch.cat([last, first + torch.arange(count, device=device)])[None]

    def holds_all(self, total: int) -> bool:
        """Whether ``total`` tokens read all before them, and in full."""
        raise NotImplementedError

    def weigh(self, queries: Queries, keys: torch.Tensor, past: int) -> None:
        """See a part of the prompt, whose first ``past`` tokens were seen before."""
        raise NotImplementedError

    def settle(self, queries: Queries, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Choose what stays of the prompt (batch, heads, tokens, head_dim), and hold it.

        ``queries`` are those of its last forward.
        """
        raise NotImplementedError

    def go_on(self, queries: Queries, keys: torch.Tensor, values: torch.Tensor) -> Read | None:
        """Store and read the tokens that follow the prompt in the same forward.

        None: nothing was let go or quantised, so the model's own mask is right.
        """
        raise NotImplementedError

    def lay_out_after(self, past: int, queries: int) -> Columns | None:
        """`lay_out` for a forward after the prompt."""
        raise NotImplementedError

    def store_after(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`store` for a forward after the prompt."""
        raise NotImplementedError

    def watch_after(
        self, queries: Queries, keys: torch.Tensor, values: torch.Tensor
    ) -> Read | None:
        """`watch` for a forward after the prompt."""
        return None
