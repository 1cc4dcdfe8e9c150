"""Let a scheduler's SIGTERM end a command as Ctrl-C does: in order, and with its state kept.

`main` runs every command inside `stops_on_sigterm`. Without it the process would be gone at once,
and its MLflow run would stay RUNNING. `RunLog` ends its run inside `undisturbed`.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_ONE_REQUEST = 5.0  # seconds; `timeout` of coreutils, for one, sends the signal twice


class Terminated(KeyboardInterrupt):
    """SIGTERM came: whatever cleans up after Ctrl-C cleans up after this too."""


@contextmanager
def stops_on_sigterm() -> Iterator[None]:
    """Raise `Terminated` in the block when SIGTERM comes.

    A signal that comes soon after another one is the same request, and does not disturb what the
    first has begun. A process that ignores SIGTERM, or has a handler of its own, keeps that.
    """
    asked_at = float("-inf")

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        if time.monotonic() - asked_at > _ONE_REQUEST:
            asked_at = time.monotonic()
            raise Terminated

    if not _is_main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def finishing(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C in the block finish what is under way, and the second end it now.

    Gives a function that says whether the first one came. A program that has a handler of its own
    for Ctrl-C, or ignores it, keeps that.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        say("finishing what is under way; Ctrl-C again ends it now")

    def is_asked() -> bool:
        return asked

    if not _is_main_thread() or signal.getsignal(signal.SIGINT) != signal.default_int_handler:
        yield is_asked
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield is_asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore SIGTERM in the block; Ctrl-C still ends it."""
    before = signal.getsignal(signal.SIGTERM)
    if not _is_main_thread() or before is None:  # None: a handler that is not Python's
        yield
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_main_thread() -> bool:
    """Whether this is the thread that Python gives signals to."""
    return threading.current_thread() is threading.main_thread()
