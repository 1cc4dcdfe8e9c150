"""Coordinators and workers are killed at random moments, and nothing is lost or done twice."""

import json
import multiprocessing
import random
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient

from kvsharer_exp.search.coordinator import run_search
from kvsharer_exp.search.execution.local import LocalExecutor
from kvsharer_exp.search.study import open_study
from tests.search import cheap, kill_driver
from tests.search.cheap_scores import make_score

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["tests.search.kill_driver", "mlflow.tracking._tracking_service.utils"]
)


def run_and_kill(folder: Path, workers: int, n_trials: int, kills: int, seed: int) -> None:
    """Start the search until it had all ``kills`` and ends by itself.

    A kill that finds nobody alive does not count. So a search that ends before it had all of them
    is started again, and killed while it begins or finds that nothing is left to do.
    """
    dice, left = random.Random(seed), kills
    while True:
        process = FORKS.Process(target=kill_driver.run, args=(folder, workers, n_trials))
        process.start()
        while left:
            kill_driver.wait_a_little(dice)
            crew = living_children(process)
            if crew and dice.random() < 0.5:
                with suppress(psutil.NoSuchProcess):
                    dice.choice(crew).kill()
                    left -= 1
                continue
            process.kill()
            process.join()
            left -= process.exitcode == -signal.SIGKILL
            _, alive = psutil.wait_procs(crew, timeout=10)
            assert not alive, "a worker outlives its coordinator"
            break
        process.join(timeout=120)
        if process.exitcode == 0 and not left:
            return
        assert process.exitcode in (0, -signal.SIGKILL)


def living_children(process: Any) -> list[psutil.Process]:
    """The workers of a coordinator; none if it has ended."""
    try:
        found = psutil.Process(process.pid).children()
        return [child for child in found if child.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize(
    ("workers", "kills", "n_trials"),
    [
        (1, 10, 45),
        (2, 10, 60),
        pytest.param(1, 100, 450, marks=pytest.mark.slow),
        pytest.param(3, 100, 600, marks=pytest.mark.slow),
    ],
)
def test_every_trial_is_there_once(tmp_path: Path, workers: int, kills: int, n_trials: int) -> None:
    run_and_kill(tmp_path, workers, n_trials, kills, seed=kills + workers)
    with open_study("s", storage=None, folder=tmp_path) as store:
        found, runs = store.results(), store.map_runs()
    assert len(found) == len({r.plan.digest for r in found}) == n_trials
    assert {r.status for r in found} == {"complete"}
    assert [r.number for r in found] == sorted(r.number for r in found)
    client = MlflowClient(kill_driver.uri(tmp_path))
    experiment = client.get_experiment_by_name(kill_driver.EXPERIMENT).experiment_id
    logged = []
    for view in (ViewType.ACTIVE_ONLY, ViewType.DELETED_ONLY):
        token = None
        while True:
            page = client.search_runs([experiment], run_view_type=view, page_token=token)
            assert not [run for run in page if run.info.status == "RUNNING"]
            if view == ViewType.ACTIVE_ONLY:
                logged += [run for run in page if "trial" in run.data.tags]
            token = page.token
            if not token:
                break
    assert {run.data.tags["digest"]: run.info.run_id for run in logged} == runs
    assert sorted(run.data.tags["digest"] for run in logged) == sorted(r.plan.digest for r in found)
    if workers == 1:
        score = make_score(json.dumps({"log": str(tmp_path / "undisturbed.txt")}))
        with open_study("other", storage=None, folder=tmp_path) as store:
            asked = cheap.search(sampler="nsgaii")
            undisturbed = run_search(store, asked, LocalExecutor(score), n_trials=n_trials)
        assert cheap.plain(found) == cheap.plain(undisturbed)
