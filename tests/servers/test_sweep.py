"""A real sweep whose study and MLflow runs are in servers, which go away and come back."""

import json
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from kvsharer_exp.cli.commands import sweep as sweep_command
from kvsharer_exp.cli.main import main
from kvsharer_exp.cli.steps import sweep_progress
from kvsharer_exp.cli.steps.sweep_progress import SweepProgress
from kvsharer_exp.tracking import patience
from tests.cli.session.test_killed_sweeps import QUICK
from tests.servers.mlflow_server import MlflowServer
from tests.servers.postgres import PASSWORD, Cluster
from tests.servers.stored import stored_trials

TRIALS = 8


@pytest.fixture
def sweep(tmp_path: Path, database: str, mlflow_server: MlflowServer, monkeypatch) -> Callable:
    """Start the sweep in a folder, in which everything that it writes lies."""
    if not mlflow_server.answers():  # a test before this one has failed
        mlflow_server.kill()
        mlflow_server.start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_command, "keep_files", lambda *_: None)  # pictures take seconds
    servers = (f"tracking.uri={mlflow_server.uri}", f"study.storage={database}")
    names = ("study.name=s", f"tracking.experiment={tmp_path.name}", "hydra.run.dir=run")
    return lambda *more: main(["sweep", *QUICK, *servers, *names, *more])


@pytest.fixture
def act() -> Callable[..., None]:
    """Do something before the results of these numbers are shown and logged."""

    def play(patch: pytest.MonkeyPatch, **acts: Callable[[], object]) -> None:
        inner = SweepProgress.add

        def add(self, result) -> bool:
            if (do := acts.get(f"at_{len(self._found)}")) is not None:
                do()
            return inner(self, result)

        patch.setattr(SweepProgress, "add", add)

    return play


def runs_of(server: MlflowServer, experiment: str) -> tuple[Run, list[Run]]:
    """The run of the sweep, and those of its trials, in order."""
    client = MlflowClient(tracking_uri=server.uri)
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    (parent,) = [run for run in runs if "study" in run.data.tags]
    trials = [run for run in runs if "trial" in run.data.tags]
    assert len(runs) == 1 + len(trials)
    return parent, sorted(trials, key=lambda run: int(run.data.tags["trial"]))


def check_complete(server: MlflowServer, experiment: str, database: str) -> None:
    """Every trial is in the study once and has one run, and every run has ended."""
    parent, trials = runs_of(server, experiment)
    assert {run.info.status for run in (parent, *trials)} == {"FINISHED"}
    assert len(trials) == TRIALS
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parent.info.run_id}
    stored = [trial for trial in stored_trials(database, "s") if "result" in trial.user_attrs]
    results = [json.loads(trial.user_attrs["result"]) for trial in stored]
    assert [run.data.tags["trial"] for run in trials] == [str(one["number"]) for one in results]
    assert len({run.data.tags["digest"] for run in trials}) == TRIALS
    client = MlflowClient(tracking_uri=server.uri)
    volumes = client.get_metric_history(parent.info.run_id, "hypervolume")
    assert {point.step for point in volumes} == set(range(1, TRIALS + 1))
    assert json.loads(Path("run/result.json").read_text())["mlflow_run_id"] == parent.info.run_id


def said(text: str, words: str) -> int:
    return len([line for line in text.splitlines() if words in line])


def all_text(cluster: Cluster, folders: list[Path]) -> bytes:
    """Everything in these folders, and all databases of the server as SQL."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    dump = subprocess.run(
        [cluster.programs / "pg_dumpall", "-d", cluster.address("postgres"), "--no-role-passwords"],
        capture_output=True,
        check=True,
    )
    return b"".join([*(path.read_bytes() for path in files), dump.stdout])


@pytest.mark.slow
def test_mlflow_is_killed_and_comes_back(
    sweep, act, mlflow_server, database, cluster, tmp_path, monkeypatch, capfd
) -> None:
    act(monkeypatch, at_3=mlflow_server.kill, at_6=mlflow_server.start)
    assert sweep() == 0
    check_complete(mlflow_server, tmp_path.name, database)
    output = capfd.readouterr()
    text = output.out + output.err + _log_file().read_text()
    assert said(output.err + output.out, "does not answer") == 1
    assert said(output.err + output.out, "answers again") == 1
    assert PASSWORD not in text
    kept = all_text(cluster, [tmp_path, mlflow_server.folder])
    assert tmp_path.name.encode() in kept
    assert PASSWORD.encode() not in kept


def _log_file() -> Path:
    (log,) = Path("run").glob("*.log")
    return log


@pytest.mark.slow
def test_mlflow_stays_away_and_the_same_command_delivers(
    sweep, act, mlflow_server, database, tmp_path, monkeypatch, capfd
) -> None:
    with monkeypatch.context() as patch:
        for module in (patience, sweep_progress):
            patch.setattr(module, "PATIENCE", 1.0)
        act(patch, at_3=mlflow_server.kill)
        assert sweep() == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert "MLflow did not answer and lacks 5 trials" in error
    assert "the same command delivers it" in error
    assert len(json.loads(Path("run/result.json").read_text())["front"]) > 0
    mlflow_server.start()
    assert sweep() == 0
    check_complete(mlflow_server, tmp_path.name, database)


@pytest.mark.slow
def test_the_database_of_both_is_away(
    sweep, act, mlflow_server, database, cluster, tmp_path, monkeypatch
) -> None:
    act(monkeypatch, at_2=cluster.stop, at_5=cluster.start)
    assert sweep() == 0
    check_complete(mlflow_server, tmp_path.name, database)


@pytest.mark.slow
def test_killed_while_both_are_away(
    sweep, act, mlflow_server, database, cluster, tmp_path, monkeypatch
) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        act(patch, at_3=cluster.stop, at_6=die)
        process = multiprocessing.get_context("fork").Process(target=sweep)
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    (spool,) = Path("mlruns/studies").glob("*.spool")
    assert len(spool.read_text().splitlines()) > 3
    cluster.start()
    assert len(stored_trials(database, "s")) < 6
    assert sweep() == 0
    check_complete(mlflow_server, tmp_path.name, database)
    assert not spool.exists()


@pytest.mark.slow
def test_the_same_command_continues_and_repeats_nothing(
    sweep, mlflow_server, database, tmp_path
) -> None:
    assert sweep("study.n_trials=5") == 0
    before = stored_trials(database, "s")
    assert sweep() == 0
    check_complete(mlflow_server, tmp_path.name, database)
    assert [t.params for t in stored_trials(database, "s")][: len(before)] == [
        trial.params for trial in before
    ]
