"""Public fault 9: an interrupt in the middle of a write left a database that was locked."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvsharer_exp.tracking import interrupts
from kvsharer_exp.tracking.interrupts import UninterruptedClient, uninterrupted
from kvsharer_exp.tracking.tracker import Tracker


@pytest.fixture(autouse=True)
def interrupting() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


def handlers() -> list:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_a_block_is_finished_first(number: signal.Signals, times: int) -> None:
    before, done = handlers(), []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            with uninterrupted():
                for _ in range(times):
                    os.kill(os.getpid(), number)
                done.append("inner")
            done.append("outer")
    assert done == ["inner", "outer"]
    assert handlers() == before


def test_who_asks_again_later_does_not_wait(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: clock[0])
    before, done = handlers(), []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("first")
            clock[0] = 2
            os.kill(os.getpid(), signal.SIGINT)
            done.append("second")
    assert done == ["first"]
    assert handlers() == before


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with uninterrupted():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_a_write_is_whole_before_the_interrupt(store: list[str], monkeypatch) -> None:
    uri = store[0].partition("=")[2]
    folder = Path(uri.removeprefix("sqlite:///")).parent
    tracker = Tracker.open(uri, "interrupts", str(folder / "artifacts"))
    assert isinstance(tracker._client, UninterruptedClient)
    inner = tracker._client._inner
    run_id = tracker.start_run("a", tags={}, params={})
    write = inner.set_tag

    def interrupted(*arguments: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(*arguments)

    monkeypatch.setattr(inner, "set_tag", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tracker._client.set_tag(run_id, "written", "whole")
    assert inner.get_run(run_id).data.tags["written"] == "whole"
    tracker.finish_all("KILLED")
    assert inner.get_run(run_id).info.status == "KILLED"
