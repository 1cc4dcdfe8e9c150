"""The coordinator of a sweep: asks Optuna for parameters, and scores every new map once.

The command ``sweep`` opens its study with `open_study` and searches with `run_search`. Drawn
parameters are decoded to a plan, which may be a map. The plan is scored, and Optuna is told its
values. A plan that is known already costs nothing: Optuna is told the same values again.

One process owns a study. The sampler works on a copy of the study in memory, where a parameter
costs microseconds; in a file it would cost milliseconds. Every finished trial is added to the
stored study in one write. Its result is part of it as JSON, so that a study can be read back whole
(`study_store`). A run that is killed at any point can be resumed, and loses only the trials under
way.
"""

from __future__ import annotations

import fcntl
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import optuna
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from kvsharer_exp.model.files import locked
from kvsharer_exp.search.journal import open_journal
from kvsharer_exp.search.spaces.base import SearchSpace, encoded
from kvsharer_exp.search.stages import Outcome
from kvsharer_exp.search.study_store import (
    Seed,
    StudyStore,
    keep_cached,
    keep_result,
    origin_attributes,
    origin_of,
)
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.trial import TrialResult

MAX_REPEATS = 200  # after so many known maps in a row, the space counts as exhausted
# After so many known maps in a row, draws are random: a sampler may insist on the best known map.
_STUCK = 10


class Score(Protocol):
    """Scores one map, as `StagedScorer` does."""

    def __call__(self, plan: KVPlan, size: Footprint, results: Sequence[TrialResult]) -> Outcome:
        """Score ``plan``, whose footprint is ``size``, given the ``results`` so far."""


@dataclass(frozen=True)
class Search:
    """What maps are drawn from, who draws them, and how each one is scored.

    Args:
        space: decodes parameters to maps.
        sampler: draws parameters of ``space``.
        score: scores a map.
        footprint: gives the memory of a map, before the map is scored.
        seeds: maps that are scored first, unless the study knows them.
        together: how many maps the sampler is asked for before the first of them is scored.
        look_ahead: is given the new maps among these, so that it may measure them in one forward.
    """

    space: SearchSpace
    sampler: BaseSampler
    score: Score
    footprint: Callable[[KVPlan], Footprint]
    seeds: Sequence[Seed] = ()
    together: int = 1
    look_ahead: Callable[[Sequence[KVPlan]], None] | None = None


@contextmanager
def open_study(
    name: str, *, storage: str | None, folder: Path, fresh: bool = False
) -> Iterator[StudyStore]:
    """Open the study ``name``, and create it if it is new; no other process has it in the block.

    Args:
        storage: an RDB URL (``postgresql://…``) or a journal file; None: a journal in ``folder``.
        folder: holds the lock of the study; it is made if it is not there.
        fresh: forget what the study holds.

    Raises:
        InputError: another process runs the study, or the storage cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / f"{name}.lock", name) as key:
        where = storage or str(folder / f"{name}.journal")
        try:
            if "://" in where:
                # A database in which two processes make Optuna's tables at once fails for one.
                with locked(folder / "study.storage.open"):
                    study = _load(name, where, fresh)
            else:
                study = _load(name, open_journal(Path(where)), fresh)
        except Exception as error:  # every backend raises its own kinds
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise InputError(
                f"study {name} cannot be opened in {where} ({first[:80]}): "
                "check study.storage, or move that file away"
            ) from error
        yield StudyStore(study, key)


def run_search(
    store: StudyStore,
    search: Search,
    *,
    n_trials: int | None = None,
    minutes: float | None = None,
    on_result: Callable[[TrialResult], bool] | None = None,
) -> list[TrialResult]:
    """Search until the study holds ``n_trials`` distinct maps, or until ``minutes`` have passed.

    It also ends when ``on_result`` returns true, or after `MAX_REPEATS` known maps in a row.

    Args:
        on_result: is called with each new result after the result was stored.

    Returns:
        All results of the study. A trial whose scoring raises ``RuntimeError`` or
        ``ArithmeticError`` is kept as ``failed`` with its reason; any other exception ends the run.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    study, space = store.study, search.space
    known = {result.plan.digest: result for result in store.results()}
    working = optuna.create_study(directions=study.directions, sampler=search.sampler)
    working.add_trials(study.get_trials(deepcopy=False))
    for origin, seed in search.seeds:
        plan = KVPlan.of(seed)
        params = encoded(space, plan)
        if params is not None and plan.digest not in known:
            working.enqueue_trial(params, user_attrs=origin_attributes(origin))
    distributions = space.distributions()
    unstuck = RandomSampler(seed=len(working.trials))
    repeats = 0
    while (n_trials is None or len(known) < n_trials) and repeats < MAX_REPEATS:
        if deadline is not None and time.monotonic() >= deadline:
            break
        working.sampler = unstuck if repeats >= _STUCK else search.sampler
        left = search.together
        if n_trials is not None:
            left = min(left, n_trials - len(known))
        asked = []
        for _ in range(left):
            trial = working.ask(distributions)
            asked.append((trial, KVPlan.of(space.decode(trial.params))))
        new = dict.fromkeys(plan for _, plan in asked if plan.digest not in known)
        started = time.perf_counter()
        if search.look_ahead is not None and len(new) > 1:
            search.look_ahead(list(new))
        share = (time.perf_counter() - started) / max(1, len(new))
        for trial, plan in asked:
            result = known.get(plan.digest)
            if result is not None:
                repeats += 1
                keep_cached(trial, result)
                study.add_trial(_tell(working, trial.number, result))
                continue
            repeats = 0
            result = _scored(trial, plan, search, list(known.values()), share)
            keep_result(trial, result)
            known[plan.digest] = result
            study.add_trial(_tell(working, trial.number, result))
            if on_result is not None and on_result(result):
                return list(known.values())
    return list(known.values())


def _scored(
    trial: optuna.Trial,
    plan: KVPlan,
    search: Search,
    so_far: Sequence[TrialResult],
    spent: float,
) -> TrialResult:
    """Score the map of ``trial``, on which ``spent`` seconds were spent before."""
    size = search.footprint(plan)
    started = time.perf_counter()
    outcome = _attempt(search.score, plan, size, so_far)
    return TrialResult(
        number=trial.number,
        params=trial.params,
        plan=plan,
        scores=outcome.scores,
        footprint=size,
        status=outcome.status,
        stage_reached=outcome.stage_reached,
        seconds=spent + time.perf_counter() - started,
        score=outcome.score,
        origin=origin_of(trial),
        reason=outcome.reason,
        window_losses=outcome.window_losses,
    )


def _attempt(score: Score, plan: KVPlan, size: Footprint, so_far: Sequence[TrialResult]) -> Outcome:
    try:
        return score(plan, size, so_far)
    except (RuntimeError, ArithmeticError) as error:  # out of memory, a kernel's refusal, inf
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Outcome({}, "failed", "none", reason=reason[:500])


def _tell(study: optuna.Study, number: int, result: TrialResult) -> FrozenTrial:
    if result.score is not None:
        return study.tell(number, (result.footprint.kv_fraction, result.score))
    pruned = result.status == "screened_out"
    return study.tell(number, state=TrialState.PRUNED if pruned else TrialState.FAIL)


def _load(name: str, storage: str | JournalStorage, fresh: bool) -> optuna.Study:
    if fresh and name in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name=name, storage=storage)
    return optuna.create_study(
        study_name=name,
        storage=storage,
        directions=["minimize", "maximize"],
        load_if_exists=True,
    )


@contextmanager
def _lock(path: Path, name: str) -> Iterator[str]:
    """Be the only process that runs the study ``name``; gives the key that is kept in the lock."""
    with path.open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"study {name} is being run by another process: wait for it, "
                "or give this run its own study.name"
            ) from error
        file.seek(0)
        key = file.read()
        if re.fullmatch("[0-9a-f]{32}", key) is None:  # it is new, or its maker was killed
            key = uuid.uuid4().hex
            file.truncate(0)
            file.write(key)
            file.flush()
        yield key
