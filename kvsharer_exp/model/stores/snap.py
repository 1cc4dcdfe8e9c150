"""The KV of an owner that keeps those tokens of a prompt that its last ones attend to.

The attention weights are averaged over the last queries and over the query heads that read one KV
head, and smoothed over neighbouring tokens, so that what stays are stretches of text. What was
chosen is held like a text of its own: in full, or quantised in groups of tokens. SnapKV, §4:
https://arxiv.org/abs/2404.14469.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import avg_pool1d

from kvsharer_exp.model.stores.base import Shape, Store
from kvsharer_exp.model.stores.columns import Columns
from kvsharer_exp.model.stores.full import FullLayer, causal
from kvsharer_exp.model.stores.packed import PackedLayer
from kvsharer_exp.model.stores.prompted import PromptedLayer, Read
from kvsharer_exp.model.stores.weights import Queries, best, taken, weights
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.keeps.snapkv import SnapKV

POOL = 5
"""Neighbouring tokens whose weights are averaged, as in SnapKV's own code."""


class SnapLayer(PromptedLayer):
    """Keeps the keys and values of a `SnapKV` of one layer."""

    parts = ("keys", "values", "_tail")

    def reset(self) -> None:
        super().reset()
        assert isinstance(self.action.keep, SnapKV)
        self._keep = self.action.keep
        self._tail: torch.Tensor | None = None  # the last queries of the prompt so far
        self._held: Store | None = None  # what stays, and all that follows it
        self._chosen: int | None = None  # the tokens of the prompt that stay; None: all, in full

    @classmethod
    def held_bytes(
        cls, action: Own, shape: Shape, size: int, context: int, prompt: int | None, first: int
    ) -> int:
        assert action.keep is not None
        held = action.keep.held(context, prompt)
        return PackedLayer.held_bytes(_without_keep(action), shape, size, held, None, 0)

    def holds_all(self, total: int) -> bool:
        assert self.end is not None
        prompts = self.real(min(total, self.end))
        return not self.action.quantised and all(self._keep.chosen(n) == n for n in prompts)

    def weigh(self, queries: Queries, keys: torch.Tensor, past: int) -> None:
        seen = queries.states
        if self._tail is not None:
            seen = torch.cat([self._tail, seen], 2)
        self._tail = seen[:, :, -self._keep.observe :].clone()

    def settle(self, queries: Queries, keys: torch.Tensor, values: torch.Tensor) -> None:
        end = keys.shape[2]
        lengths = self.real(end)
        chosen = [self._keep.chosen(length) for length in lengths]
        pads: torch.Tensor | None = self.pads
        if chosen != lengths:
            counts = torch.tensor(chosen, device=keys.device)
            places = best(self._scores(queries, keys), counts)
            keys, values = taken(keys, places), taken(values, places)
            pads = None if len(chosen) == 1 else counts.max() - counts
        if chosen != lengths or self.action.quantised:
            self._chosen = keys.shape[2]
        kind = PackedLayer if self.action.quantised else FullLayer
        self._held = kind(_without_keep(self.action), lasting=self.lasting)
        self._held.prepare(keys.shape[2], pads, keys.device)
        self._held.update(keys, values)
        self._tail = None

    def _scores(self, queries: Queries, keys: torch.Tensor) -> torch.Tensor:
        """How much each token of the prompt should stay (batch, heads, tokens)."""
        assert self._tail is not None
        end = keys.shape[2]
        scores = torch.full(keys.shape[:3], -torch.inf, device=keys.device)
        for rows, pad in self.rows():
            last = min(self._keep.observe, end - pad)
            if last <= 0:
                continue  # no token of this row's text has come
            tail = replace(queries, states=self._tail[rows, :, -last:])
            hidden = ~causal(end - pad - last, last, keys.device)
            seen = weights(tail, keys[rows, :, pad:], hidden).mean((2, 3))
            scores[rows, :, end - last :] = torch.inf
            if end - last > pad:
                others = avg_pool1d(seen[:, :, :-last], POOL, 1, POOL // 2)
                scores[rows, :, pad : end - last] = others
        return scores

    def go_on(self, queries: Queries, keys: torch.Tensor, values: torch.Tensor) -> Read | None:
        assert self.end is not None
        columns = self.lay_out_after(self.end, keys.shape[2])
        read = self.store_after(keys, values)
        return None if columns is None else (*read, columns)

    def lay_out_after(self, past: int, queries: int) -> Columns | None:
        assert self._held is not None and self.end is not None
        pads = self._held.pads
        if pads is not None:  # padding may go on after the prompt
            beyond = self.padding - self.end
            prompt = self.end if self._chosen is None else self._chosen
            pads = torch.where(beyond > 0, prompt + beyond, pads)
        columns = self._held.prepare(queries, pads, self.padding.device)
        if self._chosen is None or columns is None:
            return None
        index = self.index_after(self._chosen, self.end, past + queries - self.end)
        return replace(columns, index=index[0][columns.index])

    def store_after(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._held is not None
        return self._held.update(keys, values)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors, *(self._held.tensors if self._held is not None else ())]

    def _change(self, change: Any) -> None:
        super()._change(change)
        if self._held is not None:
            self._held._change(change)


def _without_keep(action: Own) -> Own:
    return replace(action, keep=None)
