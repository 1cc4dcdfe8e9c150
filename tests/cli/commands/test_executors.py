"""``sweep`` with an executor: the same front from workers, and what is refused beforehand."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kvsharer_exp.cli.commands import sweep as sweep_command
from kvsharer_exp.cli.main import main
from kvsharer_exp.search.study import open_study
from tests.cli.session.test_killed_sweeps import QUICK
from tests.refusals import check_refusal
from tests.search import cheap


def front_of(folder: str) -> list[tuple[str, float]]:
    found = json.loads(Path(folder, "result.json").read_text())
    return [(entry["plan"], entry["scores"]["kl"]) for entry in found["front"]]


@pytest.mark.slow
def test_a_worker_gives_the_front_of_this_process(tmp_path: Path, store, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_command, "keep_files", lambda *_: None)  # pictures take seconds
    threads = os.environ.get("OMP_NUM_THREADS")
    for name, words in (("local", ()), ("there", ("executor=processes", "executor.num_workers=1"))):
        folder = [f"study.name={tmp_path.name}-{name}", f"hydra.run.dir={name}"]
        assert main(["sweep", *QUICK, *store, *words, *folder]) == 0
    here, there = front_of("local"), front_of("there")
    assert [plan for plan, _ in there] == [plan for plan, _ in here]
    exact = 0.0 if threads == "1" else 1e-4  # a worker has threads of its own
    assert [kl for _, kl in there] == pytest.approx([kl for _, kl in here], rel=exact, abs=1e-9)
    assert (tmp_path / "there" / "workers" / "worker-0.log").read_text()
    assert not (tmp_path / "local" / "workers").exists()


REFUSALS = {
    "executor.num_workers=2": "executor.num_workers is for workers: give executor=processes",
    "executor.trial_timeout=9": "executor.trial_timeout is for workers",
    "executor=processes executor.address=h:1": "executor.address is for a Ray cluster",
    "executor=processes executor.num_workers=0": "executor.num_workers=0: give at least 1",
    "executor=ray executor.num_cpus=0": "executor.num_cpus=0: give CPUs above 0",
    "executor=ray executor.num_gpus=-1": "executor.num_gpus=-1: give at least 0",
    "executor=ray executor.trial_timeout=0": "executor.trial_timeout=0: give seconds above 0",
    "executor=processes scoring.maps_per_forward=2": "scoring.maps_per_forward=2: a worker takes",
    "executor=proceses": "did you mean processes",
}


@pytest.mark.parametrize("words", REFUSALS)
def test_what_cannot_be_is_refused_in_a_line(words: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "model=tiny", *words.split(), "hydra.run.dir=run"]) == 2
    check_refusal(capsys.readouterr().err, REFUSALS[words])


def test_other_commands_have_no_executor(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "model=tiny", "executor=processes", "hydra.run.dir=run"]) == 2
    check_refusal(capsys.readouterr().err, "evaluate knows no executor=processes: give it to sweep")


def test_more_workers_than_memory_are_refused_before_the_search(
    tmp_path: Path, store, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    free = psutil.virtual_memory()._replace(available=3 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    words = ["executor=processes", "executor.num_workers=3", f"study.name={tmp_path.name}"]
    assert main(["sweep", *QUICK, *store, *words, "hydra.run.dir=run"]) == 2
    check_refusal(capsys.readouterr().err, "executor.num_workers=3: each needs 1.0 GiB")
    assert not (tmp_path / "run" / "workers").exists()


STOPPED = """
import sys
from pathlib import Path
from kvsharer_exp.cli.stopping import finishing
from kvsharer_exp.search.coordinator import run_search
from kvsharer_exp.search.execution.pool import Pool
from kvsharer_exp.search.study import open_study
from tests.search import cheap
folder = Path(sys.argv[1])
with open_study("s", storage=None, folder=folder) as store:
    with Pool(cheap.crew(folder, seconds=1.5), 2) as pool, finishing(print) as is_asked:
        print("searching", flush=True)
        run_search(store, cheap.search(), pool, n_trials=100, is_stopped=is_asked)
"""


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_once_finishes_what_is_under_way_and_twice_does_not(tmp_path, times: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path)], cwd=cheap.ROOT)
    log = tmp_path / "scored.txt"
    while not log.exists() or len(cheap.scored(tmp_path)) < 2:
        time.sleep(0.02)
        assert process.poll() is None
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.wait(10) == (0 if times == 1 else -signal.SIGINT)
    with open_study("s", storage=None, folder=tmp_path) as store:
        assert len(store.results()) == (2 if times == 1 else 0)
        assert len(store.under_way()) == 2
    assert len(cheap.scored(tmp_path)) == 2
