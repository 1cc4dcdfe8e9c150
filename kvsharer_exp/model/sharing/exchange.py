"""The places where the layers of one model find the KV that one forward hands over.

`share_kv` makes a `OneThread` and `make_shared` an `EachThread`. The hooks of `site` look there
for KV, and `checkpointing` gives a block that may run a second time a `Handover` of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.model.stores.columns import Columns


class KeyValue(NamedTuple):
    """Keys and values of one layer, each (batch, num_key_value_heads, tokens, head_dim).

    Of a quantised owner, ``key`` has the columns that ``columns`` lays out, ``value`` the tokens.
    """

    key: torch.Tensor
    value: torch.Tensor
    columns: Columns | None = None


Handed = dict[int, dict[int | None, KeyValue]]
"""By layer, the KV that it hands over: of each part of the batch, or, under None, of all of it."""


def put(handed: Handed, layer: int, part: tuple[int, int] | None, kv: KeyValue) -> None:
    """Hand over the ``kv`` of ``layer`` for one ``part`` (number, count) of the batch, or all."""
    if part is None:
        handed[layer] = {None: kv}
    else:
        handed.setdefault(layer, {})[part[0]] = kv


def take(handed: Handed, layer: int, part: tuple[int, int] | None) -> KeyValue | None:
    """What ``layer`` handed over for one ``part`` of the batch, or for all; None if nothing."""
    held = handed.get(layer, {})
    whole = held.get(None)
    if part is None or (whole is None and part[0] in held):
        return whole if part is None else held[part[0]]
    if whole is None:
        return None
    number, count = part
    key, value = (tensor.chunk(count)[number] for tensor in whole[:2])
    return KeyValue(key, value, whole.columns and whole.columns.rows_of(number, count))


@dataclass(slots=True)
class Handover:
    """What the layers of one forward tell each other.

    ``views`` are those that the attentions were given, and ``pads`` (batch,) the padding tokens in
    front of each row, where the model was given a mask.
    """

    handed: Handed = field(default_factory=dict)
    views: dict[int, Any] = field(default_factory=dict)
    pads: torch.Tensor | None = None


class Exchange:
    """Has a `Handover` for each thread; the subclasses say what a thread without one gets."""

    def __init__(self, compiled: int = 0) -> None:
        self._handovers: dict[int, Handover] = {}
        self._compiled = compiled  # stands for the thread in compiled code, which cannot ask

    def here(self) -> Handover:
        """Return the `Handover` of the calling thread."""
        raise NotImplementedError

    def _thread(self) -> int:
        return self._compiled if torch.compiler.is_compiling() else threading.get_ident()

    @contextmanager
    def within(self, handover: Handover) -> Iterator[None]:
        """Let the calling thread find ``handover`` in the block, and afterwards what it had."""
        thread = self._thread()
        before = self._handovers.get(thread)
        self._handovers[thread] = handover
        try:
            yield
        finally:
            if before is None:
                del self._handovers[thread]
            else:
                self._handovers[thread] = before


class OneThread(Exchange):
    """The exchange of a `share_kv` block, which only the calling thread may use.

    Other threads are refused: leaving the block would change the model during their forwards.
    """

    def __init__(self, handover: Handover) -> None:
        super().__init__(compiled=threading.get_ident())
        self._handovers[self._compiled] = handover

    def here(self) -> Handover:
        thread = self._thread()
        if thread not in self._handovers:
            raise SharingError(
                "the model runs under a map of another thread: use one model per thread, "
                "or enter share_kv in the thread that runs it"
            )
        return self._handovers[thread]


class EachThread(Exchange):
    """The exchange of a model that shares for good: every thread has a `Handover` of its own.

    So any number of threads may run it, as with any other model. A copy of the model starts empty.
    """

    def here(self) -> Handover:
        thread = self._thread()
        if thread not in self._handovers:
            self._handovers[thread] = Handover()
        return self._handovers[thread]

    def __reduce__(self) -> tuple[type[EachThread], tuple[()]]:
        return EachThread, ()
