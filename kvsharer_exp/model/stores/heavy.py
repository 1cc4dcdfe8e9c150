"""The KV of an owner that keeps the tokens with the most attention so far, and the recent ones.

Each KV head adds up the attention that its tokens get from all queries. So every weight of the
prompt has to be computed, which the kernels of attention do without: this costs about as much as
the attention itself. Then one token goes for each that comes. Because any token may be the next to
go, keys are quantised by token, as values are, and not in groups of tokens. H2O:
https://arxiv.org/abs/2306.14048.
"""

from __future__ import annotations

from typing import Any

import torch

from kvsharer_exp.model.stores.base import Shape
from kvsharer_exp.model.stores.codes import Quantised, code_tokens, joined, read_tokens
from kvsharer_exp.model.stores.columns import Columns, ListedColumns
from kvsharer_exp.model.stores.full import causal
from kvsharer_exp.model.stores.prompted import PromptedLayer, Read
from kvsharer_exp.model.stores.weights import Queries, best, products, softmax, taken, weights
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.keeps.h2o import H2O

BLOCK = 128
"""Queries of a prompt whose weights are computed at once."""

_SCORE = 4  # bytes of the sum that each token of a KV head has


class HeavyLayer(PromptedLayer):
    """Keeps the keys and values of a `H2O` of one layer.

    ``scores`` (batch, heads, held tokens) are the sums; minus infinity stands for a place that
    holds no token, as in rows with more padding than others.
    """

    parts = ("keys", "values", "_held_keys", "_held_values", "scores")

    def reset(self) -> None:
        super().reset()
        assert isinstance(self.action.keep, H2O)
        self._keep, self._precision = self.action.keep, self.action.precision
        self.scores: torch.Tensor | None = None
        self._held_keys: torch.Tensor | Quantised | None = None
        self._held_values: torch.Tensor | Quantised | None = None

    @classmethod
    def held_bytes(
        cls, action: Own, shape: Shape, size: int, context: int, prompt: int | None, first: int
    ) -> int:
        assert action.keep is not None
        held, (heads, keys, values) = action.keep.held(context, prompt), shape
        return held * heads * _SCORE + sum(
            action.precision.value_bytes(held, 0, heads, features // heads, size)
            for features in (keys, values)
        )

    @property
    def _most(self) -> list[int]:
        """The most tokens that each row holds."""
        assert self.end is not None
        return [self._keep.most(length) for length in self.real(self.end)]

    def _goes(self, seen: int) -> list[bool]:
        """Whether a token of each row has to go after ``seen`` tokens."""
        return [n > most for n, most in zip(self.real(seen), self._most, strict=True)]

    def holds_all(self, total: int) -> bool:
        return not self.action.quantised and not any(self._goes(total - 1))

    def weigh(self, queries: Queries, keys: torch.Tensor, past: int) -> None:
        sums = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
        if self.scores is not None:
            sums[:, :, :past] = self.scores
        padding = torch.arange(keys.shape[2], device=keys.device) < self.padding[:, None]
        for begin in range(0, queries.states.shape[2], BLOCK):
            block = queries.cut(begin, begin + BLOCK)
            count = block.states.shape[2]
            end = past + begin + count
            hidden = ~causal(end - count, count, keys.device)
            hidden = hidden | padding[:, None, None, None, :end]
            sums[:, :, :end] += weights(block, keys[:, :, :end], hidden).sum((2, 3))
        self.scores = sums

    def settle(self, queries: Queries, keys: torch.Tensor, values: torch.Tensor) -> None:
        assert self.scores is not None
        end, device = keys.shape[2], keys.device
        tokens = torch.arange(end, device=device)
        padding = (tokens < self.padding[:, None])[:, None].expand(self.scores.shape)
        self.scores = self.scores.masked_fill(padding, -torch.inf)
        if any(self._goes(end)):
            most = torch.tensor(self._most, device=device)
            recent = torch.tensor([self._keep.recent(n) for n in self._most], device=device)
            stays = (tokens >= end - recent[:, None])[:, None]
            order = self.scores.masked_fill(stays & ~padding, torch.inf)
            counts = torch.minimum(most, torch.tensor(self.real(end), device=device))
            places = best(order, counts)
            keys, values = taken(keys, places), taken(values, places)
            self.scores = taken(self.scores, places).masked_fill(places < 0, -torch.inf)
        self._held_keys, self._held_values = self._coded(keys), self._coded(values)

    def go_on(self, queries: Queries, keys: torch.Tensor, values: torch.Tensor) -> Read | None:
        return self.watch_after(queries, *self.store_after(keys, values))

    def lay_out_after(self, past: int, queries: int) -> Columns | None:
        return None  # what a query reads depends on the queries before it

    def store_after(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._held_keys is not None and self._held_values is not None
        self._held_keys = _joined(self._held_keys, self._coded(keys))
        self._held_values = _joined(self._held_values, self._coded(values))
        return self._read(self._held_keys, keys), self._read(self._held_values, values)

    def watch_after(
        self, queries: Queries, keys: torch.Tensor, values: torch.Tensor
    ) -> Read | None:
        assert self.scores is not None
        held, count = self.scores.shape[2], queries.states.shape[2]
        total = self.cumulative_length
        past = total - count
        visible = self._advance(queries, keys, past)
        self._let_go(total)
        if self.end is not None and not self.action.quantised and not any(self._goes(total - 1)):
            return None
        groups = queries.states.shape[1] // keys.shape[1]
        index = self.index_after(held, past, count)
        return keys, values, ListedColumns(index, visible.repeat_interleave(groups, 1))

    def _advance(self, queries: Queries, keys: torch.Tensor, past: int) -> torch.Tensor:
        """Read the tokens after ``past`` others one by one, and give up one for each.

        Returns which columns each query reads, (batch, heads, queries, columns).
        """
        assert self.scores is not None
        held, count = self.scores.shape[2], queries.states.shape[2]
        new = self.scores.new_zeros(*self.scores.shape[:2], count)
        tokens = past + torch.arange(count, device=new.device)
        padding = tokens < self.padding[:, None]  # it may go on after the prompt
        scores = torch.cat([self.scores, new.masked_fill(padding[:, None], -torch.inf)], 2)
        visible = torch.zeros(
            *scores.shape[:2], count, held + count, dtype=torch.bool, device=scores.device
        )
        device = scores.device
        recent = torch.tensor([self._keep.recent(n) for n in self._most], device=device)
        attended = products(queries, keys)
        for step in range(count):
            end = held + step + 1
            now = scores[:, :, :end]
            alive = now > -torch.inf
            visible[:, :, step, :end] = alive
            now += softmax(attended[:, :, :, step, :end], ~alive[:, :, None]).sum(2)
            goes = self._goes(past + step + 1)
            if any(goes):
                place = alive.flip(-1).cumsum(-1).flip(-1)  # 1 for the most recent
                stays = ~alive | (place <= recent[:, None, None])
                lowest = now.masked_fill(stays, torch.inf).argmin(-1, keepdim=True)
                gone = torch.tensor(goes, device=device)[:, None, None]
                now.scatter_(-1, lowest, now.gather(-1, lowest).masked_fill(gone, -torch.inf))
        self.scores = scores
        return visible

    def _let_go(self, total: int) -> None:
        """Free the places of tokens that have gone, after ``total`` tokens."""
        assert self.scores is not None
        assert self._held_keys is not None and self._held_values is not None
        if not any(self._goes(total)):
            return
        counts = [min(n, most) for n, most in zip(self.real(total), self._most, strict=True)]
        alive = (self.scores > -torch.inf).float()
        places = best(alive, torch.tensor(counts, device=alive.device))
        self.scores = taken(self.scores, places).masked_fill(places < 0, -torch.inf)
        self._held_keys = _taken(self._held_keys, places)
        self._held_values = _taken(self._held_values, places)

    def _coded(self, numbers: torch.Tensor) -> torch.Tensor | Quantised:
        if not self.action.quantised:
            return numbers
        return code_tokens(numbers, self._precision, packed=self.lasting)

    def _read(self, held: torch.Tensor | Quantised, like: torch.Tensor) -> torch.Tensor:
        if isinstance(held, torch.Tensor):
            return held
        return read_tokens(held, self._precision, like.shape[-1], like.dtype, packed=self.lasting)


def _joined(held: Any, new: Any) -> Any:
    return torch.cat([held, new], 2) if isinstance(held, torch.Tensor) else joined(held, new)


def _taken(held: Any, places: torch.Tensor) -> Any:
    if isinstance(held, torch.Tensor):
        return taken(held, places)
    return Quantised(*(taken(part, places) for part in held))
