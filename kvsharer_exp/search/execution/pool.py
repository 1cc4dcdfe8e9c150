"""An executor with many workers, of which any may die, hang or come late.

A `Crew` starts, feeds and ends the workers: `ProcessCrew` on this machine, `RayCrew` in a cluster.
The `Pool` knows which worker has which task. A task whose worker is lost goes to another one, and a
new worker is started; it counts as free once it says that it is ready. A plan that loses
`ATTEMPTS` workers fails with the reason of the last loss. A place where so many workers in a row do
not start is given up, and the run ends when none is left. In a cluster that has grown, workers are
added when a plan is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvsharer_exp.search.execution.base import Done, Task, Worker, failed
from kvsharer_exp.values.plan import KVPlan

ATTEMPTS = 3
"""How many workers one plan, or the start of one worker, may cost."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has loaded what it needs."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker is gone for this ``reason``; ``error`` is what the run has to end with, if any."""

    reason: str
    error: Exception | None = None


News = Ready | Done | Lost


class Crew(Protocol):
    """Starts, feeds and ends workers. A worker is whatever the crew makes it."""

    def start(self, number: int) -> Any:
        """Start a worker in the place ``number``; its `Ready` or `Lost` comes later."""

    def send(self, worker: Any, task: Task) -> None:
        """Have a ready worker score the plan of ``task``; a `Done` or `Lost` comes later."""

    def stop(self, worker: Any) -> None:
        """End a worker now, whatever it does; no news of it comes any more."""

    def news(self, seconds: float | None) -> list[tuple[Any, News]]:
        """Wait for news of any worker, at most so long; returns each with its worker."""


@dataclass(eq=False, slots=True)
class _Place:
    """The place of one worker: who works there, on what, and what came before.

    ``since`` is when the worker was started, and then when it was given its task.
    """

    number: int
    worker: Any
    is_ready: bool = False
    task: Task | None = None
    since: float = 0.0
    last: KVPlan | None = None
    failed_starts: int = 0


class Pool:
    """Runs tasks with the workers of ``crew`` (`base.Executor`); a context manager.

    Args:
        count: the number of workers at first.
        may_have: says how many there may be now. None: no more than ``count``.
        trial_timeout: the seconds that a plan may take; the worker is lost then. None: any time.
        start_timeout: the seconds that a worker may take until it is ready. None: any time.
        say: is told of each worker that is lost.
        clock: gives the time in seconds.
    """

    def __init__(
        self,
        crew: Crew,
        count: int,
        *,
        may_have: Callable[[], int] | None = None,
        trial_timeout: float | None = None,
        start_timeout: float | None = None,
        say: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._crew, self._count = crew, count  # the most workers so far
        self._may_have = may_have
        self._trial_timeout, self._start_timeout = trial_timeout, start_timeout
        self._say, self._clock = say, clock
        self._places: list[_Place] = []
        self._again: list[Task] = []  # lost their worker
        self._losses: dict[int, int] = {}  # by the number of the task

    def __enter__(self) -> Pool:
        try:
            for number in range(self._count):
                self._open(number)
        except BaseException:
            self._stop()
            raise
        return self

    def _open(self, number: int) -> None:
        self._places.append(_Place(number, self._crew.start(number), since=self._clock()))

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def workers(self) -> tuple[Worker, ...]:
        return tuple(map(self._doing, list(self._places)))

    def _doing(self, place: _Place) -> Worker:
        task = place.task
        if task is None:
            return Worker("free" if place.is_ready else "starting")
        return Worker("busy", str(task.plan), time.time() - (self._clock() - place.since))

    @property
    def room(self) -> int:
        return max(0, len(self._free()) - len(self._again))

    def submit(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self._give(task)

    def withdraw(self) -> list[Task]:
        left, self._again = self._again, []
        return left

    def wait(self) -> list[Done]:
        while self._again and self._free():
            self._give(self._again.pop(0))
        done: list[Done] = []
        places = {id(place.worker): place for place in self._places}
        for worker, news in self._crew.news(self._seconds_left()):
            place = places[id(worker)]
            if isinstance(news, Ready):
                place.is_ready, place.failed_starts = True, 0
            elif isinstance(news, Done):
                assert place.task is not None and place.task.number == news.number
                place.last, place.task = place.task.plan, None
                self._losses.pop(news.number, None)
                done.append(news)
            else:
                done += self._lose(place, news)
        for place in list(self._places):
            limit = self._limit(place)
            if limit is not None and self._clock() - place.since >= limit:
                reason = f"not ready after {limit:g} seconds"
                if place.task is not None:
                    reason = f"no result after executor.trial_timeout={limit:g} seconds"
                done += self._lose(place, Lost(reason))
        if done and self._may_have is not None:
            self._grow(self._may_have())
        return done

    def _grow(self, count: int) -> None:
        """Open places, so that there are ``count`` beside those that were given up."""
        while self._count < count:
            self._say(f"there is room for worker {self._count}: it is started")
            self._open(self._count)
            self._count += 1

    def _free(self) -> list[_Place]:
        return [place for place in self._places if place.is_ready and place.task is None]

    def _give(self, task: Task) -> None:
        """Give ``task`` to the free worker whose last plan begins most like it.

        Such a worker has the states of the common layers.
        """
        place = max(self._free(), key=lambda place: _in_common(place.last, task.plan))
        place.task, place.since = task, self._clock()
        self._crew.send(place.worker, task)

    def _lose(self, place: _Place, loss: Lost) -> list[Done]:
        """Start a new worker; the task of the lost one is done again, or fails."""
        self._crew.stop(place.worker)
        if loss.error is not None:
            raise loss.error
        task, then = place.task, "a new one is started"
        done: list[Done] = []
        if task is None:
            place.failed_starts += 1
            if place.failed_starts == ATTEMPTS:
                self._give_up(place, loss.reason)
                return done
        else:
            self._losses[task.number] = self._losses.get(task.number, 0) + 1
            if self._losses[task.number] == ATTEMPTS:
                del self._losses[task.number]
                done = [Done(task.number, failed(loss.reason), self._clock() - place.since)]
                then = "its plan failed as often as it is tried"
            else:
                self._again.append(task)
                then = "its plan is scored again"
        self._say(f"worker {place.number} is lost ({loss.reason}): {then}")
        place.worker, place.since = self._crew.start(place.number), self._clock()
        place.is_ready, place.task, place.last = False, None, None
        return done

    def _give_up(self, place: _Place, reason: str) -> None:
        """Go on without this place.

        Raises:
            RuntimeError: it was the last one.
        """
        self._places.remove(place)
        if not self._places:
            raise RuntimeError(f"worker {place.number} does not start: {reason}")
        left = f"{len(self._places)} of {self._count}"
        self._say(f"worker {place.number} does not start ({reason}): the sweep goes on with {left}")

    def _limit(self, place: _Place) -> float | None:
        """The seconds that the worker may take for what it does now; None if any time."""
        if place.task:
            return self._trial_timeout
        return None if place.is_ready else self._start_timeout

    def _seconds_left(self) -> float | None:
        """The seconds until the first worker takes too long; None if none may."""
        limits = [(place.since, self._limit(place)) for place in self._places]
        ends = [since + limit for since, limit in limits if limit is not None]
        return max(0.0, min(ends) - self._clock()) if ends else None

    def _stop(self) -> None:
        for place in self._places:
            self._crew.stop(place.worker)
        self._places.clear()


def _in_common(one: KVPlan | None, other: KVPlan) -> int:
    """How many layers from the first on do the same in both plans."""
    if one is None:
        return 0
    pairs = list(zip(one.actions, other.actions, strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
