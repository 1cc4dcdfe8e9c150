"""Public fault 9: whenever a sweep is killed, the next start of its study leaves nothing open.

A kill is played by an interrupt after which the run's log does nothing, as if the process were
gone. `tests/test_kills.py` kills real processes.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run, ViewType
from mlflow.tracking import MlflowClient

from kvsharer_exp.cli.commands import sweep as sweep_command
from kvsharer_exp.cli.main import main
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.search.study import open_study
from kvsharer_exp.search.study_store import StudyStore
from kvsharer_exp.tracking.tracker import Tracker

QUICK = (
    *("model=tiny", "calibration.num_windows=3", "calibration.window_tokens=16"),
    *("scoring.num_windows=3", "scoring.window_tokens=16", "scoring.search.tasks=[]"),
    *("scoring.report.tasks=[]", "heldout.num_windows=2", "heldout.window_tokens=24"),
    *("study.n_trials=8", "fit.num_windows=4", "fit.window_tokens=24", "--quiet"),
)


@pytest.fixture
def client(store: list[str]) -> MlflowClient:
    return MlflowClient(tracking_uri=store[0].partition("=")[2])


@pytest.fixture
def sweep(tmp_path: Path, store: list[str], monkeypatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_command, "keep_files", lambda *_: None)  # pictures take seconds
    name = f"study.name={tmp_path.name}"
    return lambda *more: main(["sweep", *QUICK, *store, name, "hydra.run.dir=run", *more])


@pytest.fixture
def kill(sweep, monkeypatch) -> Callable[..., None]:
    """Start the sweep, and kill it when it has called a method so often, before or after."""

    def play(owner: type, method: str, count: int, *, after: bool, **wanted: Any) -> None:
        inner, calls = getattr(owner, method), []

        def killed(*arguments: Any, **options: Any) -> Any:
            calls.append(method)
            if len(calls) == count and not after:
                raise KeyboardInterrupt
            result = inner(*arguments, **options)
            if len(calls) == count:
                raise KeyboardInterrupt
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, method, killed)
            patch.setattr(RunLog, "__exit__", lambda *_: None)
            assert sweep() == 130

    return play


def all_runs(client: MlflowClient, study: str) -> Iterator[Run]:
    """Every run of the study, deleted ones too: those of sweeps, and their child runs."""
    (experiment,) = [client.get_experiment_by_name("kvsharer_exp").experiment_id]
    for view in (ViewType.ACTIVE_ONLY, ViewType.DELETED_ONLY):
        yield from client.search_runs([experiment], f"tags.study = '{study}'", view)
        for run in client.search_runs([experiment], run_view_type=view):
            above = run.data.tags.get("mlflow.parentRunId")
            if above and client.get_run(above).data.tags.get("study") == study:
                yield run


KILLS = {
    "while the run begins": (Tracker, "log_datasets", 1, False),
    "before the study knows its run": (RunLog, "start", 1, True),
    "before a trial is logged": (Tracker, "log_trial", 3, False),
    "in the middle of a trial's run": (Tracker, "_log", 6, False),
    "before the study knows a trial's run": (StudyStore, "keep_map_run", 3, False),
    "in the end": (Tracker, "save_view", 1, True),
}


BEFORE_IT_IS_KNOWN = ("while the run begins", "before the study knows its run")
QUICKLY = ("in the middle of a trial's run",)


@pytest.mark.parametrize(
    "kind", [k if k in QUICKLY else pytest.param(k, marks=pytest.mark.slow) for k in KILLS]
)
def test_the_next_start_leaves_every_trial_once_and_nothing_open(
    kill, sweep, client, tmp_path, store, kind: str
) -> None:
    owner, method, count, after = KILLS[kind]
    kill(owner, method, count, after=after)
    assert [run for run in all_runs(client, tmp_path.name) if run.info.status == "RUNNING"]
    assert sweep() == 0
    found = list(all_runs(client, tmp_path.name))
    assert not [run for run in found if run.info.status == "RUNNING"]
    result = json.loads(Path("run/result.json").read_text())
    parent = client.get_run(result["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    killed = [r for r in found if "study_key" in r.data.tags and r.info.status == "KILLED"]
    assert len(killed) == (kind in BEFORE_IT_IS_KNOWN)
    for before in killed:
        assert before.data.tags["continued_by"] == parent.info.run_id
        assert parent.data.tags["continues"] == before.info.run_id
    children = [
        run for run in found if "trial" in run.data.tags and run.info.lifecycle_stage == "active"
    ]
    assert [run.data.tags["mlflow.parentRunId"] for run in children] == [parent.info.run_id] * 8
    assert {run.info.status for run in children} == {"FINISHED"}
    assert len({run.data.tags["digest"] for run in children}) == 8
    assert len({run.data.tags["trial"] for run in children}) == 8
    folder = Path(store[1].partition("=")[2]) / "studies"
    with open_study(tmp_path.name, storage=None, folder=folder) as study:
        assert {r.plan.digest: study.map_run(r.plan) for r in study.results()} == {
            run.data.tags["digest"]: run.info.run_id for run in children
        }
    volumes = client.get_metric_history(parent.info.run_id, "hypervolume")
    assert {point.step for point in volumes} == set(range(1, 9))
    by_trial = sorted(children, key=lambda run: int(run.data.tags["trial"]))
    growing = [run.data.metrics["hypervolume"] for run in by_trial]
    assert growing == sorted(growing)


@pytest.mark.slow
def test_a_study_that_is_made_afresh_ends_the_run_of_the_old_one(
    kill, sweep, client, tmp_path
) -> None:
    kill(Tracker, "_log", 6, after=False)
    old = [run.info.run_id for run in all_runs(client, tmp_path.name)]
    assert sweep("study.fresh=true") == 0
    assert not [run for run in all_runs(client, tmp_path.name) if run.info.status == "RUNNING"]
    assert "KILLED" in {client.get_run(run_id).info.status for run_id in old}


@pytest.mark.slow
def test_a_study_of_the_same_name_in_another_folder_is_left_alone(
    kill, sweep, client, tmp_path
) -> None:
    kill(Tracker, "log_trial", 3, after=False)
    (other,) = [r for r in all_runs(client, tmp_path.name) if "study_key" in r.data.tags]
    assert sweep(f"tracking.folder={tmp_path}/mine") == 0
    assert client.get_run(other.info.run_id).info.status == "RUNNING"
    assert sweep() == 0
    assert client.get_run(other.info.run_id).info.status == "FINISHED"
