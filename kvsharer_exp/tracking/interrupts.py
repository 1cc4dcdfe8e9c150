"""Hold Ctrl-C and SIGTERM back while MLflow writes to a database.

An interrupt in the middle of a transaction leaves a connection that still holds the database's
lock. The run could then not be ended as KILLED, because the same process waits for itself.
`store.open_store` returns a client whose calls are not interrupted.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_HELD = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 1.0  # seconds; a signal that is sent to a process and to its group comes twice


class UninterruptedClient:
    """An MLflow client, each call of which is finished before an interrupt is raised."""

    def __init__(self, client: Any) -> None:
        self._inner = client

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            with uninterrupted():
                return value(*arguments, **options)

        return call


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Raise in the end of the block what Ctrl-C or SIGTERM would have raised in it.

    A signal that comes again after a second is raised at once, so that nobody has to wait for a
    block that hangs. One that is ignored, or that Python does not handle, is left as it is.
    """
    handlers = {number: signal.getsignal(number) for number in _HELD}
    came: dict[int, float] = {}

    def hold(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - came.setdefault(number, time.monotonic()) > _PATIENCE:
            release()

    def release() -> None:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
        while came:
            signal.raise_signal(came.popitem()[0])

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for number, handler in handlers.items():
        if callable(handler):
            signal.signal(number, hold)
    try:
        yield
    finally:
        release()
