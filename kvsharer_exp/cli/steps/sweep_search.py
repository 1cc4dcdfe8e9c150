"""Run the search of a ``sweep``: show it, keep it in MLflow, and let it be watched and stopped."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.steps.sweep_progress import SweepProgress
from kvsharer_exp.cli.stopping import finishing
from kvsharer_exp.search.coordinator import Search, run_search
from kvsharer_exp.search.execution.base import Executor
from kvsharer_exp.search.study_status import Progress, watched
from kvsharer_exp.search.study_store import StudyStore
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.trial import TrialResult


def search_in(
    config: Config,
    log: RunLog,
    store: StudyStore,
    search: Search,
    executor: Executor,
    reference: tuple[float, float],
) -> list[TrialResult]:
    """Search until the study's limits are met; returns all results of the study.

    Raises:
        InputError: the time ended before one plan was scored.
        KeyboardInterrupt: Ctrl-C came, and what was under way is finished.
    """
    study, began, known = config.study, time.time(), len(store.results())
    n_trials = study.n_trials if study.minutes is None else None
    minutes = config.search_minutes

    def progress() -> Progress:
        until = None if minutes is None else began + 60 * minutes
        return Progress(study.storage, began, time.time(), known, n_trials, until, executor.workers)

    with ExitStack() as stack:
        shown = SweepProgress(config, log, store, reference, executor)
        stack.enter_context(shown.shown())
        is_asked = stack.enter_context(finishing(log.say))
        folder = Path(config.tracking.folder) / "studies"
        stack.enter_context(watched(folder, store.name, progress))
        found = run_search(
            store,
            search,
            executor,
            n_trials=n_trials,
            minutes=minutes,
            on_result=shown.add,
            is_stopped=is_asked,
        )
        if is_asked():
            raise KeyboardInterrupt
    if not found:
        raise InputError(
            f"study.minutes={study.minutes:g} ended before one map was scored: give more"
        )
    if study.minutes is None and shown.is_used_up(found):
        log.say(f"{config.search_space.kind} holds no more new maps: search ends")
    return found
