"""The places where the layers of one model find the KV that one forward hands over.

`share_kv` makes a `OneThread` and `make_shared` an `EachThread`. The hooks in `hooks` look there
for KV, and `checkpointing` gives a block that may run a second time a `Handover` of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from kvsharer_exp.model.sharing.cache import KeyValue, TargetView
from kvsharer_exp.model.sharing.projections import SharingError


@dataclass(slots=True)
class Handover:
    """The KV that one forward hands over, by source layer, and the views its targets were given."""

    handed: dict[int, KeyValue] = field(default_factory=dict)
    views: dict[int, TargetView] = field(default_factory=dict)


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
