"""The KV of one quantised owner, as a layer of a transformers cache.

A key group is ``group`` consecutive real tokens of one row. It is quantised once, when its last
token has come, and never again, so what a token reads does not depend on how the text was cut into
forwards. Until then its keys wait in full. A token's values are quantised when it comes. The first
``sinks`` real tokens stay in full; their places in the first group are filled up. They stay also
where a keep lets other tokens go. Without a cache (scoring) what is stored is not packed.

`grouped_columns` says which columns a forward reads. Layout: KIVI,
https://arxiv.org/abs/2402.02750.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad as padded

from kvsharer_exp.model.stores.base import Store
from kvsharer_exp.model.stores.codes import (
    Quantised,
    code_tokens,
    dequantise,
    joined,
    pack,
    quantise,
    read_tokens,
    unpack,
)
from kvsharer_exp.model.stores.grouped import GroupedColumns, grouped_columns
from kvsharer_exp.values.keeps.window import Window


class PackedLayer(Store):
    """Keeps the keys and values of one layer in few bits."""

    parts = ("_keys", "_key_sinks", "_waiting", "_values", "_value_sinks")

    def reset(self) -> None:
        super().reset()
        self.precision = self.action.precision
        self._keys: Quantised | None = None  # (batch, heads, groups, head_dim, group)
        self._values: Quantised | None = None  # (batch, heads, tokens, channel groups, channels)
        self._key_sinks: torch.Tensor | None = None
        self._value_sinks: torch.Tensor | None = None
        self._waiting: torch.Tensor | None = None
        self._waiting_from = self._first_slot = self._end_slot = 0
        self._columns: GroupedColumns | None = None

    @property
    def _apart(self) -> int:
        """How many sinks have columns of their own, in front of the others."""
        return 0 if self.action.keep is None else self.precision.sinks

    def lay_out(self, queries: int, pads: torch.Tensor) -> GroupedColumns:
        past, keep = self.cumulative_length, self.action.keep
        self._columns = grouped_columns(
            self.precision.group,
            past=past,
            queries=queries,
            offset=self.offset(past),
            first_slot=self._first_slot,
            waiting=self._waiting_from,
            pads=pads,
            first_value=self.first_held(past),
            sinks=self._apart,
            recent=keep.recent if isinstance(keep, Window) else None,
        )
        return self._columns

    def store(
        self, keys: torch.Tensor, values: torch.Tensor, past: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        columns, self._columns = self._columns, None
        assert columns is not None
        return self._store_keys(keys, past, columns), self._store_values(values, past)

    def _store_keys(self, new: torch.Tensor, past: int, columns: GroupedColumns) -> torch.Tensor:
        group, sinks, total = self.precision.group, self.precision.sinks, self.cumulative_length
        start = self._waiting_from
        waiting = new if self._waiting is None else torch.cat([self._waiting, new], 2)
        ends = [max(0, total - pad) // group for _, pad in self.rows()]
        self._grow_keys(max(ends) - self._end_slot, waiting)
        for (rows, pad), end in zip(self.rows(), ends, strict=True):
            first = max(0, past - pad) // group
            if first == end:
                continue
            tokens = waiting[rows, :, pad + first * group - start : pad + end * group - start]
            blocks = tokens.unflatten(2, (-1, group)).transpose(-1, -2)
            if first == 0 and sinks:
                if self._key_sinks is None:
                    self._key_sinks = waiting.new_zeros(*waiting.shape[:2], sinks, new.shape[-1])
                self._key_sinks[rows] = tokens[:, :, :sinks]
                blocks = blocks.clone()
                if sinks < group:
                    blocks[:, :, 0, :, :sinks] = blocks[:, :, 0, :, sinks : sinks + 1]
            assert self._keys is not None
            place = slice(first - self._first_slot, end - self._first_slot)
            for held, made in zip(
                self._keys, self._packed(quantise(blocks, self.precision.bits)), strict=True
            ):
                held[rows, :, place] = made
        result = torch.cat([self._stored_keys(columns, waiting), waiting], 2)
        opens = [pad + end * group for (_, pad), end in zip(self.rows(), ends, strict=True)]
        self._waiting_from = min(min(opens), total)
        self._waiting = waiting[:, :, self._waiting_from - start :].clone()
        self._forget_keys()
        return result

    def _grow_keys(self, more: int, like: torch.Tensor) -> None:
        """Make room for ``more`` groups."""
        if more <= 0:
            return
        batch, heads, _, head_dim = like.shape
        group, bits = self.precision.group, self.precision.bits
        length = group * bits // 8 if self.lasting else group
        shape = (batch, heads, more, head_dim)
        codes = torch.zeros(*shape, length, dtype=torch.uint8, device=like.device)
        zeros = torch.zeros(shape, dtype=torch.float16, device=like.device)
        new = Quantised(codes, zeros, zeros.clone())
        self._keys = new if self._keys is None else joined(self._keys, new)
        self._end_slot += more

    def _stored_keys(self, columns: GroupedColumns, like: torch.Tensor) -> torch.Tensor:
        """The keys of the columns before the waiting ones, (batch, heads, columns, head_dim)."""
        if self._apart:
            sinks = self._key_sinks
            if sinks is None:
                sinks = like.new_zeros(*like.shape[:2], self._apart, like.shape[-1])
            return torch.cat([sinks, self._group_keys(columns, like)], 2)
        keys = self._group_keys(columns, like)
        if self._key_sinks is not None and columns.first_slot == 0 < columns.end_slot:
            keys[:, :, : self.precision.sinks] = self._key_sinks
        return keys

    def _group_keys(self, columns: GroupedColumns, like: torch.Tensor) -> torch.Tensor:
        if self._keys is None or columns.end_slot == columns.first_slot:
            return like[:, :, :0]
        place = slice(columns.first_slot - self._first_slot, columns.end_slot - self._first_slot)
        held = Quantised(*(part[:, :, place] for part in self._keys))
        return dequantise(self._unpacked(held), like.dtype).transpose(-1, -2).flatten(2, 3)

    def _forget_keys(self) -> None:
        """Drop the groups and sinks that no later query can read, because of a window."""
        first = self._first_token(self.first_held(self.cumulative_length))
        slot = min(first // self.precision.group, self._end_slot)
        if slot > self._first_slot and self._keys is not None:
            self._keys = Quantised(
                *(part[:, :, slot - self._first_slot :].clone() for part in self._keys)
            )
            self._first_slot = slot
        if self._no_sinks:
            self._key_sinks = None

    def _first_token(self, column: int) -> int:
        """The first real token at or after ``column``, the least of all rows."""
        return max(0, column - max(pad for _, pad in self.rows()))

    @property
    def _no_sinks(self) -> bool:
        """Whether the model's own mask hides the sinks from every later query."""
        return self._first_token(self.offset(self.cumulative_length)) >= self.precision.sinks

    def _store_values(self, new: torch.Tensor, past: int) -> torch.Tensor:
        total, sinks, head_dim = self.cumulative_length, self.precision.sinks, new.shape[-1]
        fresh = code_tokens(new, self.precision, packed=self.lasting)
        held = fresh if self._values is None else joined(self._values, fresh)
        self._keep_sinks(new, past)
        values = read_tokens(held, self.precision, head_dim, new.dtype, packed=self.lasting)
        start = total - values.shape[2]
        if self._value_sinks is not None:
            for rows, pad in self.rows():
                first, end = max(0, start - pad), min(sinks, total - pad)
                if first < end:
                    place = slice(first + pad - start, end + pad - start)
                    values[rows, :, place] = self._value_sinks[rows, :, first:end]
        if self._apart:
            values = torch.cat([self._sink_values(values), values], 2)
        drop = self.first_held(total) - start
        self._values = (
            Quantised(*(part[:, :, drop:].clone() for part in held)) if drop > 0 else held
        )
        if self._no_sinks:
            self._value_sinks = None
        return values

    def _sink_values(self, like: torch.Tensor) -> torch.Tensor:
        """The values of the sinks, with zeros for those that have not come."""
        sinks, held = self._apart, self._value_sinks
        if held is None:
            return like.new_zeros(*like.shape[:2], sinks, like.shape[-1])
        return padded(held, (0, 0, 0, sinks - held.shape[2]))

    def _keep_sinks(self, new: torch.Tensor, past: int) -> None:
        """Keep the values of those of the ``new`` tokens that are sinks of their rows."""
        sinks, total = self.precision.sinks, self.cumulative_length
        for rows, pad in self.rows():
            first, end = max(0, past - pad), min(sinks, total - pad)
            if first >= end:
                continue
            if self._value_sinks is None:
                self._value_sinks = new[:, :, :0]
            missing = end - self._value_sinks.shape[2]
            if missing > 0:
                self._value_sinks = padded(self._value_sinks, (0, 0, 0, missing))
            place = slice(first + pad - past, end + pad - past)
            self._value_sinks[rows, :, first:end] = new[rows, :, place]

    def _packed(self, made: Quantised) -> Quantised:
        return made._replace(codes=pack(made.codes, self.precision.bits)) if self.lasting else made

    def _unpacked(self, held: Quantised) -> Quantised:
        if not self.lasting:
            return held
        return held._replace(codes=unpack(held.codes, self.precision.bits))
