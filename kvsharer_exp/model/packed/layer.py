"""The KV of one quantised owner, as a layer of a transformers cache.

A key group is ``group`` consecutive real tokens of one row. It is quantised once, when its last
token has come, and never again, so what a token reads does not depend on how the text was cut into
forwards. Until then its keys wait in full. A token's values are quantised when it comes. The first
``sinks`` real tokens stay in full; their places in the first group are filled up. Without a cache
(scoring) the same layer is used for one forward, and what it stores is not packed.

`make_columns` says which columns a forward reads. The hook of the action ``own`` sets them before
each forward, so no attention can use such a layer without its mask. Layout: KIVI,
https://arxiv.org/abs/2402.02750.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import pad as padded
from transformers.cache_utils import CacheLayerMixin

from kvsharer_exp.model.packed.codes import Quantised, dequantise, pack, quantise, unpack
from kvsharer_exp.model.packed.columns import Columns, make_columns
from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.values.precision import Precision

_NAMES = ("_keys", "_key_sinks", "_waiting", "_values", "_value_sinks", "pads")


class PackedLayer(CacheLayerMixin):
    """Keeps the keys and values of one layer in few bits.

    Args:
        window: the sliding window; None when all tokens are kept.
        packing: False for a layer that lives for one forward only.
    """

    is_croppable = False  # what a group was before it was quantised is gone
    supports_early_init = False

    def __init__(
        self, precision: Precision, window: int | None = None, *, packing: bool = True
    ) -> None:
        super().__init__()
        self.precision, self.window, self.packing = precision, window, packing
        self.is_sliding = window is not None
        self.columns: Columns | None = None
        self.reset()

    def reset(self) -> None:
        self.is_initialized = False
        self.cumulative_length = 0
        self.pads: torch.Tensor | None = None
        self._keys: Quantised | None = None  # (batch, heads, groups, head_dim, group)
        self._values: Quantised | None = None  # (batch, heads, tokens, channel groups, channels)
        self._key_sinks: torch.Tensor | None = None
        self._value_sinks: torch.Tensor | None = None
        self._waiting: torch.Tensor | None = None
        self._waiting_from = self._first_slot = self._end_slot = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        offset = self._offset(self.cumulative_length)
        return self.cumulative_length + query_length - offset, offset

    def _offset(self, seen: int) -> int:
        """The first token that a query after ``seen`` tokens may read."""
        return 0 if self.window is None else max(0, seen - self.window + 1)

    def prepare(self, queries: int, pads: torch.Tensor | None, device: torch.device) -> Columns:
        """Set the columns for the next forward, of ``queries`` tokens a row, and return them.

        ``pads`` (batch,) are the padding tokens in front of each row; None: as before.
        """
        if pads is not None:
            self.pads = pads.to(device)
        rows = [pad for _, pad in self._rows()]
        self.columns = make_columns(
            self.precision.group,
            past=self.cumulative_length,
            queries=queries,
            offset=self._offset(self.cumulative_length),
            first_slot=self._first_slot,
            waiting=self._waiting_from,
            pads=torch.tensor(rows, device=device),
        )
        return self.columns

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (batch, heads, queries, head_dim) each.

        Returns the keys of `columns`, and the values of all tokens that the model's mask is for.

        Raises:
            SharingError: the plan that this cache was filled under is not in force.
        """
        columns, self.columns = self.columns, None
        if columns is None:
            raise SharingError(
                "the cache holds quantised KV of a plan: run the model under that plan, "
                "or start with a new cache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.cumulative_length
        self.cumulative_length = past + key_states.shape[2]
        keys = self._store_keys(key_states, past, columns)
        values = self._store_values(value_states, past)
        return keys, values

    def _rows(self) -> Iterator[tuple[slice, int]]:
        """The rows of the batch that have the same number of padding tokens, and that number."""
        if self.pads is None:
            yield slice(None), 0
        elif len(set(pads := self.pads.tolist())) == 1:
            yield slice(None), pads[0]
        else:
            yield from ((slice(row, row + 1), pad) for row, pad in enumerate(pads))

    def _store_keys(self, new: torch.Tensor, past: int, columns: Columns) -> torch.Tensor:
        group, sinks, total = self.precision.group, self.precision.sinks, self.cumulative_length
        start = self._waiting_from
        waiting = new if self._waiting is None else torch.cat([self._waiting, new], 2)
        ends = [max(0, total - pad) // group for _, pad in self._rows()]
        self._grow_keys(max(ends) - self._end_slot, waiting)
        for (rows, pad), end in zip(self._rows(), ends, strict=True):
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
        opens = [pad + end * group for (_, pad), end in zip(self._rows(), ends, strict=True)]
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
        length = group * bits // 8 if self.packing else group
        shape = (batch, heads, more, head_dim)
        codes = torch.zeros(*shape, length, dtype=torch.uint8, device=like.device)
        zeros = torch.zeros(shape, dtype=torch.float16, device=like.device)
        new = Quantised(codes, zeros, zeros.clone())
        self._keys = new if self._keys is None else _joined(self._keys, new)
        self._end_slot += more

    def _stored_keys(self, columns: Columns, like: torch.Tensor) -> torch.Tensor:
        """The keys of the complete groups of ``columns``, (batch, heads, tokens, head_dim)."""
        if self._keys is None or columns.end_slot == columns.first_slot:
            return like[:, :, :0]
        place = slice(columns.first_slot - self._first_slot, columns.end_slot - self._first_slot)
        held = Quantised(*(part[:, :, place] for part in self._keys))
        keys = dequantise(self._unpacked(held), like.dtype).transpose(-1, -2).flatten(2, 3)
        if self._key_sinks is not None and columns.first_slot == 0:
            keys[:, :, : self.precision.sinks] = self._key_sinks
        return keys

    def _forget_keys(self) -> None:
        """Drop the groups and sinks that no later query can read, because of a sliding window."""
        first = self._first_token()
        slot = min(first // self.precision.group, self._end_slot)
        if slot > self._first_slot and self._keys is not None:
            self._keys = Quantised(
                *(part[:, :, slot - self._first_slot :].clone() for part in self._keys)
            )
            self._first_slot = slot
        if first >= self.precision.sinks:
            self._key_sinks = None

    def _first_token(self) -> int:
        """The first real token that the next query may read, the least of all rows."""
        offset = self._offset(self.cumulative_length)
        return max(0, offset - max(pad for _, pad in self._rows()))

    def _store_values(self, new: torch.Tensor, past: int) -> torch.Tensor:
        total, sinks, head_dim = self.cumulative_length, self.precision.sinks, new.shape[-1]
        channels = self.precision.channels(head_dim)
        fresh = quantise(new.unflatten(-1, (-1, channels)), self.precision.bits)
        fresh = self._packed(fresh._replace(codes=fresh.codes.flatten(-2)))
        held = fresh if self._values is None else _joined(self._values, fresh)
        self._keep_sinks(new, past)
        codes = self._unpacked(held)
        codes = codes._replace(codes=codes.codes.unflatten(-1, (-1, channels)))
        values = dequantise(codes, new.dtype).flatten(-2)
        start = total - values.shape[2]
        if self._value_sinks is not None:
            for rows, pad in self._rows():
                first, end = max(0, start - pad), min(sinks, total - pad)
                if first < end:
                    place = slice(first + pad - start, end + pad - start)
                    values[rows, :, place] = self._value_sinks[rows, :, first:end]
        drop = self._offset(total) - start
        self._values = (
            Quantised(*(part[:, :, drop:].clone() for part in held)) if drop > 0 else held
        )
        if self._first_token() >= sinks:
            self._value_sinks = None
        return values

    def _keep_sinks(self, new: torch.Tensor, past: int) -> None:
        """Keep the values of those of the ``new`` tokens that are sinks of their rows."""
        sinks, total = self.precision.sinks, self.cumulative_length
        for rows, pad in self._rows():
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
        return made._replace(codes=pack(made.codes, self.precision.bits)) if self.packing else made

    def _unpacked(self, held: Quantised) -> Quantised:
        if not self.packing:
            return held
        return held._replace(codes=unpack(held.codes, self.precision.bits))

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that holds KV."""
        parts = [getattr(self, name) for name in _NAMES[:-1]]
        return [t for p in parts if p is not None for t in (p if isinstance(p, tuple) else (p,))]

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in _NAMES:
            held = getattr(self, name)
            if held is not None:
                new = Quantised(*map(change, held)) if isinstance(held, Quantised) else change(held)
                setattr(self, name, new)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._change(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda held: held[indices.to(held.device)])

    def offload(self) -> None:
        self._change(lambda held: held.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._change(lambda held: held.to(self.device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        raise SharingError(
            "the cache of a quantised owner cannot go back: use no assisted decoding, "
            "or keep the layers in 16 bits"
        )


def _joined(held: Quantised, new: Quantised) -> Quantised:
    return Quantised(*(torch.cat(pair, 2) for pair in zip(held, new, strict=True)))
