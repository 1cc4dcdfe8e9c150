"""The coordinator of a sweep: asks Optuna for parameters, and has every new plan scored once.

The command ``sweep`` opens its study (`study.open_study`) and searches with `run_search`. Drawn
parameters are decoded to a plan, which may be a map. A new plan goes to the executor as soon as
somebody there is free: nobody waits for others. A plan that is known costs nothing: Optuna is told
the same values again. A plan that is under way is told when it is done.

The sampler works on a copy of the study in memory, where a parameter costs microseconds; in a file
it would cost milliseconds. In this copy the trials under way are RUNNING, so samplers know of them.
Every finished trial is added to the stored study in one write. Its result is part of it as JSON, so
that a study can be read back whole (`study_store`). The study also keeps what is under way. A run
that is killed at any point can be resumed: it scores the plans that were under way, with the same
parameters, and goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import Trial

from kvsharer_exp.search.bars import Bars
from kvsharer_exp.search.execution.base import Done, Executor, Task
from kvsharer_exp.search.reseeded import Reseeded
from kvsharer_exp.search.spaces.base import SearchSpace, encoded
from kvsharer_exp.search.stored_trial import (
    is_cached,
    keep_cached,
    keep_result,
    origin_attributes,
    origin_of,
)
from kvsharer_exp.search.study_store import Seed, StudyStore
from kvsharer_exp.search.working_study import tell, working_study
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.trial import TrialResult

MAX_REPEATS = 200  # after so many known maps in a row, the space counts as exhausted
# After so many known maps in a row, draws are random: a sampler may insist on the best known map.
_STUCK = 10


@dataclass(frozen=True)
class Search:
    """What plans are drawn from, who draws them, and what each has to beat.

    Args:
        space: decodes parameters to plans.
        sampler: draws parameters of ``space``.
        footprint: gives the memory of a plan, before the plan is scored.
        seeds: plans that are scored first, unless the study knows them.
        bars: what the results so far ask of the next plan; those of the study are added to it.
    """

    space: SearchSpace
    sampler: BaseSampler
    footprint: Callable[[KVPlan], Footprint]
    seeds: Sequence[Seed] = ()
    bars: Bars = field(default_factory=Bars)


@dataclass(frozen=True, slots=True)
class Limits:
    """When a search ends, beside an ``on_result`` that returns true.

    Args:
        n_trials: the number of distinct plans in the study; None: any number.
        seconds: the time after which no more plans are begun; None: no limit.
        is_stopped: is asked before each plan; those under way are finished.
    """

    n_trials: int | None = None
    seconds: float | None = None
    is_stopped: Callable[[], bool] = lambda: False


class Coordinator:
    """Runs one search.

    Args:
        on_result: is called with each new result after the result was stored; true ends the search.
        clock: gives the time in seconds.
    """

    def __init__(
        self,
        store: StudyStore,
        search: Search,
        executor: Executor,
        *,
        on_result: Callable[[TrialResult], bool | None] = lambda result: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._search, self._executor = store, search, executor
        self._on_result, self._clock = on_result, clock
        self._limits, self._began, self._ended = Limits(), clock(), False
        self._known = {result.plan.digest: result for result in store.results()}
        for result in self._known.values():
            search.bars.add(result)
        self._under_way: dict[int, tuple[Trial, KVPlan, Footprint]] = {}  # by the task's number
        self._meeting: dict[str, list[Trial]] = {}  # by the digest of each, others that met it
        self._slots: dict[int, int] = {}  # by the number of the task, where the study keeps it
        self._free: list[int] = []  # slots whose trial is done
        stored = store.study.get_trials(deepcopy=False)
        self._numbered = len(stored)
        self._repeats = 0
        for trial in reversed(stored):
            if not is_cached(trial):
                break
            self._repeats += 1
        self._working = working_study(stored, store.study.directions)
        self._unstuck = Reseeded(lambda seed: RandomSampler(seed=seed), 0)
        self._distributions = search.space.distributions()
        self._enqueue()

    def run(self, limits: Limits) -> list[TrialResult]:
        """Search until a limit is met; returns all results of the study."""
        self._limits, self._began, self._ended = limits, self._clock(), False
        while True:
            while (count := self._wanted()) > 0:
                self._begin(count)
            if self._ended or limits.is_stopped():
                self._withdraw()
            if not self._under_way and (self._is_over() or self._has_all()):
                return list(self._known.values())
            for done in self._executor.wait():
                self._ended = self._finish(done) or self._ended

    def _is_over(self) -> bool:
        limits = self._limits
        late = limits.seconds is not None and self._clock() - self._began >= limits.seconds
        return self._ended or late or self._repeats >= MAX_REPEATS or limits.is_stopped()

    def _has_all(self) -> bool:
        return self._limits.n_trials is not None and len(self._known) >= self._limits.n_trials

    def _wanted(self) -> int:
        """How many trials are to begin now."""
        if self._is_over():
            return 0
        room, n_trials = self._executor.room, self._limits.n_trials
        if n_trials is None:
            return room
        return min(room, n_trials - len(self._known) - len(self._under_way))

    def _withdraw(self) -> None:
        """Leave out what nobody has begun. The study keeps it as under way, for the next run."""
        for task in self._executor.withdraw():
            _, plan, _ = self._under_way.pop(task.number)
            del self._meeting[plan.digest]

    def _enqueue(self) -> None:
        """Put first what was under way when an earlier run was killed, and then the seeds."""
        space, first = self._search.space, self._store.under_way()
        for origin, seed in self._search.seeds:
            params = encoded(space, KVPlan.of(seed))
            first += [] if params is None else [(origin, params)]
        met = set(self._known)
        for origin, params in first:
            digest = KVPlan.of(space.decode(params)).digest
            if digest not in met:
                met.add(digest)
                self._working.enqueue_trial(params, user_attrs=origin_attributes(origin))

    def _begin(self, count: int) -> None:
        """Ask for ``count`` plans, and have the new ones scored."""
        tasks: list[Task] = []
        for _ in range(count):
            stuck = self._repeats >= _STUCK
            self._working.sampler = self._unstuck if stuck else self._search.sampler
            trial = self._working.ask(self._distributions)
            plan = KVPlan.of(self._search.space.decode(trial.params))
            known = self._known.get(plan.digest)
            self._repeats += 1
            if known is not None:
                self._tell_cached(trial, known)
            elif plan.digest in self._meeting:
                self._meeting[plan.digest].append(trial)
            else:
                self._repeats = 0
                self._meeting[plan.digest] = []
                size = self._search.footprint(plan)
                self._under_way[trial.number] = trial, plan, size
                self._keep_under_way(trial)
                bar = self._search.bars.of(size.kv_fraction)
                tasks.append(Task(trial.number, plan, bar))
        if tasks:
            self._executor.submit(tasks)

    def _finish(self, done: Done) -> bool:
        """Keep what came out of a trial; returns whether the search may end."""
        trial, plan, size = self._under_way.pop(done.number)
        self._free.append(self._slots.pop(done.number))
        outcome = done.outcome
        result = TrialResult(
            number=self._numbered,
            params=trial.params,
            plan=plan,
            scores=outcome.scores,
            footprint=size,
            status=outcome.status,
            stage_reached=outcome.stage_reached,
            seconds=done.seconds,
            score=outcome.score,
            origin=origin_of(trial),
            reason=outcome.reason,
            window_losses=outcome.window_losses,
        )
        keep_result(trial, result)
        self._known[plan.digest] = result
        self._search.bars.add(result)
        self._add(trial, result)
        for met in self._meeting.pop(plan.digest):
            self._tell_cached(met, result)
        return bool(self._on_result(result))

    def _tell_cached(self, trial: Trial, known: TrialResult) -> None:
        keep_cached(trial, known)
        self._add(trial, known)

    def _add(self, trial: Trial, result: TrialResult) -> None:
        """Tell the sampler, and write the trial to the study."""
        self._store.study.add_trial(tell(self._working, trial.number, result))
        self._numbered += 1

    def _keep_under_way(self, trial: Trial) -> None:
        """Have the study keep the trial, in a place that a finished one has left."""
        slot = self._free.pop() if self._free else len(self._slots)
        self._slots[trial.number] = slot
        self._store.keep_under_way(slot, origin_of(trial), trial.params)


def run_search(
    store: StudyStore,
    search: Search,
    executor: Executor,
    *,
    n_trials: int | None = None,
    minutes: float | None = None,
    on_result: Callable[[TrialResult], bool | None] = lambda result: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[TrialResult]:
    """Search until the study holds ``n_trials`` distinct plans, or until ``minutes`` have passed.

    It also ends when ``on_result`` returns true, when ``is_stopped`` does, or after `MAX_REPEATS`
    known plans in a row. What is under way then is finished first.

    Returns:
        All results of the study.
    """
    coordinator = Coordinator(store, search, executor, on_result=on_result)
    seconds = None if minutes is None else 60 * minutes
    return coordinator.run(Limits(n_trials, seconds, is_stopped))
