"""Public fault 9: SIGTERM ends a command as Ctrl-C does, and once."""

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from kvsharer_exp.cli.main import main
from kvsharer_exp.cli.session import calibration
from kvsharer_exp.cli.stopping import Terminated, stops_on_sigterm, undisturbed
from kvsharer_exp.tracking.tracker import Tracker

QUICK = ("model=tiny", "calibration.num_windows=4", "calibration.window_tokens=24")


def terminate(*arguments: object, **options: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def runs(store: list[str], seed: int) -> list[str]:
    client = MlflowClient(tracking_uri=store[0].partition("=")[2])
    experiment = client.get_experiment_by_name("kvsharer_exp").experiment_id
    found = client.search_runs([experiment], filter_string=f"params.seed = '{seed}'")
    return [run.info.status for run in found]


def test_sigterm_is_exit_code_143_and_the_run_says_killed(
    tmp_path, monkeypatch, store, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibration, "layer_means", terminate)
    assert main([*QUICK, *store, "calibrate", "seed=78"]) == 143
    assert capfd.readouterr().err == "kvsharer: terminated; what was done is kept\n"
    assert runs(store, 78) == ["KILLED"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_that_is_sent_twice_does_not_disturb_the_end(tmp_path, monkeypatch, store) -> None:
    """`timeout` of coreutils sends it to the process, and to its group."""
    finish = Tracker.finish

    def disturbed(self: Tracker, *arguments: str) -> None:
        terminate()
        finish(self, *arguments)
        terminate()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibration, "layer_means", terminate)
    monkeypatch.setattr(Tracker, "finish", disturbed)
    assert main([*QUICK, *store, "calibrate", "seed=79"]) == 143
    assert runs(store, 79) == ["KILLED"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupt_ends_all_jobs_of_a_multirun(
    tmp_path, monkeypatch, store, number: signal.Signals, code: int
) -> None:
    asked = []

    def stop(*arguments: object, **options: object) -> None:
        asked.append(number)
        os.kill(os.getpid(), number)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibration, "layer_means", stop)
    assert main([*QUICK, *store, "calibrate", "-m", "seed=80,81"]) == code
    assert asked == [number]


def test_one_request_is_raised_once_and_a_later_one_again(monkeypatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("kvsharer_exp.cli.stopping.time.monotonic", lambda: clock[0])
    with stops_on_sigterm():
        with pytest.raises(Terminated):
            terminate()
        terminate()
        clock[0] += 6
        with pytest.raises(Terminated):
            terminate()
        clock[0] += 6
        with undisturbed():
            terminate()
        with pytest.raises(Terminated):
            terminate()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_who_ignores_sigterm_or_handles_it_keeps_that() -> None:
    for handler in (signal.SIG_IGN, lambda number, frame: None):
        signal.signal(signal.SIGTERM, handler)
        try:
            with stops_on_sigterm(), undisturbed():
                terminate()
            assert signal.getsignal(signal.SIGTERM) == handler
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_another_thread_leaves_signals_alone() -> None:
    done = []

    def work() -> None:
        with stops_on_sigterm(), undisturbed():
            done.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.SIG_DFL]


@pytest.mark.slow
def test_a_path_means_the_same_with_chdir(tmp_path, monkeypatch, store) -> None:
    """Every run folder had a store of its own under ``hydra.job.chdir=true``."""
    Tracker.open(store[0].partition("=")[2])
    (tmp_path / "mlruns").mkdir()
    shutil.copy(store[0].partition("=sqlite:///")[2], tmp_path / "mlruns" / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        folder = f"hydra.run.dir=out/{number}"
        experiment = "tracking.experiment=chdir"
        assert main([*QUICK, "calibrate", "hydra.job.chdir=true", folder, experiment]) == 0
        assert (tmp_path / "out" / str(number) / "result.json").is_file()
        assert Path.cwd() == tmp_path
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.db")] == [
        Path("mlruns/mlflow.db")
    ]
    client = MlflowClient(tracking_uri="sqlite:///mlruns/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("chdir").experiment_id])
    assert [run.info.status for run in found] == ["FINISHED", "FINISHED"]
    kept = (tmp_path / "mlruns" / "artifacts" / "chdir").glob("*/artifacts/result.json")
    assert len(list(kept)) == 2
