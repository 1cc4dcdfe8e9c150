"""A coordinator with a study, an MLflow store and workers, that is killed and started again.

It imports no torch. Its processes are forked from one that has the imports behind it.
"""

import random
import sys
import time
from pathlib import Path

from kvsharer_exp.search.coordinator import run_search
from kvsharer_exp.search.execution.pool import Pool
from kvsharer_exp.search.study import open_study
from kvsharer_exp.tracking.leftovers import STUDY_KEY
from kvsharer_exp.tracking.tracker import Tracker
from kvsharer_exp.values.trial import TrialResult
from tests.search import cheap

EXPERIMENT = "kills"


def uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def run(folder: Path, workers: int, n_trials: int) -> None:
    """Search to the end, as ``sweep`` does: a result is in the study first, and then in MLflow."""
    assert "torch" not in sys.modules
    tracker = Tracker.open(uri(folder), EXPERIMENT, str(folder / "artifacts"))
    with open_study("s", storage=None, folder=folder) as store:
        known = store.mlflow_run_id if tracker.exists(store.mlflow_run_id or "none") else None
        parent = tracker.start_run("sweep", tags={STUDY_KEY: store.key}, params={}, run_id=known)
        store.mlflow_run_id = parent
        tracker.close_left_open(store.key, parent, store.map_runs().values())

        def keep(result: TrialResult) -> None:
            store.keep_map_run(result.plan, tracker.log_trial(parent, result, {}))

        logged = store.map_runs()
        for result in store.results():
            if result.plan.digest not in logged:
                keep(result)
        with Pool(cheap.crew(folder, seconds=0.02), workers) as pool:
            run_search(
                store, cheap.search(sampler="nsgaii"), pool, n_trials=n_trials, on_result=keep
            )
        tracker.finish(parent)


def wait_a_little(dice: random.Random) -> None:
    """Some time that is short in the beginning and in the middle of a run alike."""
    time.sleep(dice.choice([0.2, 1.0, 2.0]) * dice.random())
