"""The executor of one process: it scores the plans itself, one after the other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from kvsharer_exp.search.execution.base import Done, Score, Task, Worker, attempt
from kvsharer_exp.values.plan import KVPlan


class LocalExecutor:
    """Scores plans in this process (`base.Executor`).

    Args:
        together: how many plans are taken before the first of them is scored.
        look_ahead: is given the plans among these, so that it may measure them in one forward.
    """

    def __init__(
        self,
        score: Score,
        *,
        together: int = 1,
        look_ahead: Callable[[Sequence[KVPlan]], None] | None = None,
    ) -> None:
        self._score, self._together, self._look_ahead = score, together, look_ahead
        self._waiting: deque[Task] = deque()
        self._doing = Worker("free")
        self._spent = 0.0  # seconds on each of the plans that wait, before it is scored itself

    @property
    def workers(self) -> tuple[Worker, ...]:
        return (self._doing,)

    @property
    def room(self) -> int:
        return 0 if self._waiting else self._together

    def submit(self, tasks: Sequence[Task]) -> None:
        started = time.perf_counter()
        if self._look_ahead is not None and len(tasks) > 1:
            self._look_ahead([task.plan for task in tasks])
        self._spent = (time.perf_counter() - started) / len(tasks)
        self._waiting += tasks

    def wait(self) -> list[Done]:
        task = self._waiting.popleft()
        self._doing = Worker("busy", str(task.plan), time.time())
        done = attempt(self._score, task)
        self._doing = Worker("free")
        return [replace(done, seconds=done.seconds + self._spent)]

    def withdraw(self) -> list[Task]:
        left = list(self._waiting)
        self._waiting.clear()
        return left
