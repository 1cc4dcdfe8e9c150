"""A layer of a transformers cache that holds the KV of one owner in its own way.

`packed` holds it in few bits, `window` the first and the most recent tokens, `snap` and `heavy`
those that are attended to most. `registry` says which one an owner needs. The hook of the action
``own`` lets it `prepare` before each forward, which says what the queries may read, so no attention
can use such a layer without its mask. Without a cache (scoring) it is used for one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from transformers.cache_utils import CacheLayerMixin

from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.model.stores.columns import Columns
from kvsharer_exp.model.stores.weights import Queries
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.keeps.window import Window

Shape = tuple[int, int, int]
"""(KV heads, key features, value features) of a layer; features are heads × head_dim."""


class Store(CacheLayerMixin):
    """Base of these layers.

    Subclasses name their tensors of KV in ``parts``, which may be tuples of tensors or None. It
    counts the tokens that it has seen, not those that it holds, as masks and positions need it.

    Args:
        action: in how many bits it holds KV, and of which tokens.
        window: the model's own sliding window; None without one.
        lasting: False for one that is used for one forward only.
    """

    is_croppable = False  # what is no longer held is gone
    supports_early_init = False
    watches: ClassVar[bool] = False  # needs the queries
    parts: ClassVar[tuple[str, ...]]

    def __init__(self, action: Own, window: int | None = None, *, lasting: bool = True) -> None:
        super().__init__()
        self.action, self.window, self.lasting = action, window, lasting
        self.is_sliding = window is not None
        self.reset()

    @classmethod
    def held_bytes(
        cls, action: Own, shape: Shape, size: int, context: int, prompt: int | None, first: int
    ) -> int:
        """Bytes of one sequence of ``context`` tokens; ``size`` is that of an unquantised number.

        The first ``prompt`` of them were the prompt, None: all. The model's own mask lets the next
        token read those from ``first`` on.
        """
        keep, sinks, (heads, keys, values) = action.keep, None, shape
        if isinstance(keep, Window):
            sinks = keep.sinks if first < keep.sinks else 0
            first = max(first, keep.first_recent(context))
        held = (context, first, heads)
        return action.precision.key_bytes(
            *held, keys // heads, size, sinks
        ) + action.precision.value_bytes(*held, values // heads, size, sinks)

    def reset(self) -> None:
        self.is_initialized = self.is_prepared = False
        self.cumulative_length = 0
        self.pads: torch.Tensor | None = None
        for name in self.parts:
            setattr(self, name, None)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        offset = self.offset(self.cumulative_length)
        return self.cumulative_length + query_length - offset, offset

    def offset(self, seen: int) -> int:
        """The first token that the model's own mask lets a query after ``seen`` tokens read."""
        return 0 if self.window is None else max(0, seen - self.window + 1)

    def first_held(self, seen: int) -> int:
        """The first token that is held after ``seen`` tokens, sinks aside."""
        keep = self.action.keep
        return max(self.offset(seen), keep.first_recent(seen) if isinstance(keep, Window) else 0)

    def prepare(
        self, queries: int, pads: torch.Tensor | None, device: torch.device
    ) -> Columns | None:
        """Make ready for the next forward, of ``queries`` tokens a row: the columns it will read.

        None: one column for each token that the model's mask is for. ``pads`` (batch,) are the
        padding tokens in front of each row; None: as before.
        """
        if pads is not None:
            self.pads = pads.to(device)
        self.is_prepared = True
        return self.lay_out(queries, torch.tensor([pad for _, pad in self.rows()], device=device))

    def lay_out(self, queries: int, pads: torch.Tensor) -> Columns | None:
        """The columns of the next forward; ``pads`` (rows,), one row if all are alike."""
        raise NotImplementedError

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (batch, heads, queries, head_dim) each.

        Returns the keys of the columns, and the values that these have their places in.

        Raises:
            SharingError: the plan that this cache was filled under is not in force.
        """
        prepared, self.is_prepared = self.is_prepared, False
        if not prepared:
            raise SharingError(
                "the cache holds KV of a plan, quantised or not of all tokens: run the model "
                "under that plan, or start with a new cache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.cumulative_length
        self.cumulative_length = past + key_states.shape[2]
        return self.store(key_states, value_states, past)

    def watch(
        self, queries: Queries, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Columns] | None:
        """See the queries of a forward, and the keys and values that `update` returned for it.

        Returns the keys, values and columns that attention must read instead, or None.
        """
        return None

    def store(
        self, keys: torch.Tensor, values: torch.Tensor, past: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `update` does with the tokens after ``past`` others."""
        raise NotImplementedError

    def rows(self) -> Iterator[tuple[slice, int]]:
        """The rows of the batch that have the same number of padding tokens, and that number."""
        if self.pads is None:
            yield slice(None), 0
        elif len(set(pads := self.pads.tolist())) == 1:
            yield slice(None), pads[0]
        else:
            yield from ((slice(row, row + 1), pad) for row, pad in enumerate(pads))

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that holds KV."""
        parts = [getattr(self, name) for name in self.parts]
        return [t for p in parts if p is not None for t in (p if isinstance(p, tuple) else (p,))]

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in (*self.parts, "pads"):
            held = getattr(self, name)
            if held is not None:
                new = type(held)(*map(change, held)) if isinstance(held, tuple) else change(held)
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
            f"the cache of an owner that keeps {self.action.words} cannot go back: use no "
            "assisted decoding, or keep all tokens in 16 bits"
        )
