"""What the coordinator asks of an executor: to score plans somewhere, and to say what came out.

`LocalExecutor` scores in this process. A `Pool` has workers, which are processes of this machine or
actors of a Ray cluster. A worker knows nothing of the study: it is given a plan and the bar to
pass, both as text, and gives the outcome back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvsharer_exp.search.outcome import Bar, Outcome
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.record import Record
from kvsharer_exp.values.text import clip

PLAN_FAULTS = (RuntimeError, ArithmeticError)
"""What one plan may end in: memory ran out, a kernel refused, or a score is not finite.

Any other exception is a fault of ours.
"""
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")  # as CUDA and cuBLAS say it


@dataclass(frozen=True, slots=True)
class Task(Record):
    """A plan to score. ``number`` tells it from the other tasks of the same run."""

    number: int
    plan: KVPlan
    bar: Bar


@dataclass(frozen=True, slots=True)
class Done(Record):
    """What came of the task ``number`` after so many ``seconds``."""

    number: int
    outcome: Outcome
    seconds: float


@dataclass(frozen=True, slots=True)
class Worker(Record):
    """What one worker does: ``state`` is busy, free or starting; ``since`` when it began ``plan``.

    Times are seconds since 1970.
    """

    state: str
    plan: str = ""
    since: float = 0.0


class Score(Protocol):
    """Scores one plan, as `StagedScorer` does."""

    def __call__(self, plan: KVPlan, bar: Bar) -> Outcome:
        """Score ``plan``, which has to pass ``bar``."""


class Executor(Protocol):
    """Scores the tasks that it is given, in any order."""

    @property
    def workers(self) -> tuple[Worker, ...]:
        """What each worker does now."""

    @property
    def room(self) -> int:
        """How many more tasks can be taken now."""

    def submit(self, tasks: Sequence[Task]) -> None:
        """Take ``tasks``, at most ``room`` of them."""

    def wait(self) -> list[Done]:
        """Wait until something happens, and return what is done: it may be nothing yet."""

    def withdraw(self) -> list[Task]:
        """Give back the tasks that nobody has begun."""


class DeviceLostError(Exception):
    """From here on the device fails whatever this process asks of it; a new process may use it."""


def attempt(score: Score, task: Task) -> Done:
    """Score the plan of ``task``.

    One of `PLAN_FAULTS` makes a failed outcome with its reason.

    Raises:
        DeviceLostError: the plans that come next would fail too, whatever they are.
    """
    started = time.perf_counter()
    try:
        outcome = score(task.plan, task.bar)
    except PLAN_FAULTS as error:
        outcome = failed(reason_of(error))
    return Done(task.number, outcome, time.perf_counter() - started)


def reason_of(error: Exception) -> str:
    """Why the plan that was being scored failed, for ``error`` is one of `PLAN_FAULTS`.

    Raises:
        DeviceLostError: the plans that come next would fail too, whatever they are.
    """
    if _loses_device(error):
        first = clip(str(error).strip().partition("\n")[0], 80)
        raise DeviceLostError(f"{first}: run again, only a new process can go on") from error
    return f"{type(error).__name__}: {error}"


def _loses_device(error: Exception) -> bool:
    """Whether CUDA refuses all further work of this process; not so where memory ran out.

    Known by the name and the text, so that nobody who starts workers has to import torch.
    """
    text = str(error)
    is_cuda = type(error).__name__ == "AcceleratorError" or "CUDA error" in text
    return is_cuda and not any(sign in text for sign in _OUT_OF_MEMORY)


def failed(reason: str) -> Outcome:
    """The outcome of a plan that could not be scored for this ``reason``."""
    return Outcome({}, "failed", "none", reason=" ".join(reason.split())[:500])
