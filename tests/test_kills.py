"""A sweep that is killed again and again ends as if nobody had touched it (public faults 5, 6, 9).

Real processes are killed at random moments, with SIGKILL and with SIGTERM. After every other
SIGKILL the journal is cut at a random byte of its last record, as a kill in the middle of a write
leaves it. In the end each trial is there once, no run is left RUNNING, and nothing has hung.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient

from kvsharer_exp.search.study import open_study

KILLS, TERMS, TRIALS = 30, 10, 120
HANG = 180  # seconds; an undisturbed start takes less than a tenth
COMMAND = (
    *(sys.executable, "-m", "kvsharer_exp", "sweep", "model=tiny", "study.name=killed"),
    *("calibration.num_windows=3", "calibration.window_tokens=16", "compression.ratios=[0.34,0.5]"),
    *("scoring.num_windows=3", "scoring.window_tokens=16", "scoring.search.tasks=[]"),
    *("scoring.report.tasks=[]", "heldout.num_windows=2", "heldout.window_tokens=24"),
    *(f"study.n_trials={TRIALS}", "hydra.run.dir=run"),
)


class Sweeps:
    """Starts the same command again and again in one folder; counts how each start ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = folder / "mlruns" / "studies" / "killed.journal"
        self.ends: Counter[int] = Counter()
        self.said = ""

    def start(self) -> subprocess.Popen[str]:
        paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            COMMAND,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, process: subprocess.Popen[str]) -> int:
        """Wait for a process, which must not hang; returns its exit code."""
        try:
            self.said, error = process.communicate(timeout=HANG)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        self.ends[process.returncode] += 1
        assert "Traceback" not in error, error
        if process.returncode > 0:
            assert error == "kvsharer: terminated; what was done is kept\n", error
        return process.returncode

    def disturb(self, number: signal.Signals, rng: random.Random) -> int:
        """Start, and send a signal at a random moment of the start or of the search.

        A start that is done before the signal comes is none: the next one gets it.
        """
        while True:
            process = self.start()
            before = self.size()
            # The journal is written to when the search is near; most of what can go wrong is there.
            searching = rng.random() < 0.7
            while searching and process.poll() is None and self.size() == before:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 5 if searching else 9))
            process.send_signal(number)
            if code := self.end(process):
                return code

    def size(self) -> int:
        return self.journal.stat().st_size if self.journal.exists() else 0

    def cut(self, rng: random.Random) -> None:
        """Cut the journal at a random byte of its last record."""
        whole = self.journal.read_bytes() if self.journal.exists() else b""
        if whole:
            os.truncate(self.journal, rng.randrange(whole.rfind(b"\n", 0, -1) + 1, len(whole)))

    def running(self) -> set[str]:
        return {run.info.run_id for run in self.runs() if run.info.status == "RUNNING"}

    def runs(self) -> list:
        """Every run, also the deleted ones."""
        file = self.folder / "mlruns" / "mlflow.db"
        if not file.exists():  # a client would make it
            return []
        client = MlflowClient(tracking_uri=f"sqlite:///{file}")
        experiment = client.get_experiment_by_name("kvsharer_exp")
        if experiment is None:
            return []
        found = client.search_runs(
            [experiment.experiment_id], run_view_type=ViewType.ALL, max_results=5000
        )
        return list(found)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_at_random_moments_lose_nothing_and_leave_nothing(tmp_path: Path) -> None:
    rng = random.Random(5)
    sweeps = Sweeps(tmp_path)
    signals = [signal.SIGKILL] * KILLS + [signal.SIGTERM] * TERMS
    rng.shuffle(signals)
    kills = 0
    for number in signals:
        before = sweeps.running()
        code = sweeps.disturb(number, rng)
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL
            kills += 1
            if kills % 2:
                sweeps.cut(rng)
        else:
            # -SIGTERM: it was not yet, or no longer, inside `main`.
            assert code in (143, -signal.SIGTERM)
            if code == 143:
                # Before a start has opened its study, it cannot end what an earlier one left.
                assert sweeps.running() <= (set() if "full cache" in sweeps.said else before)

    assert sweeps.end(sweeps.start()) == 0
    print(dict(sweeps.ends))

    with open_study("killed", storage=None, folder=sweeps.journal.parent) as study:
        digests = [result.plan.digest for result in study.results()]
        logged = study.map_runs()
    assert len(digests) == len(set(digests)) == TRIALS
    runs = sweeps.runs()
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    parent = result["mlflow_run_id"]
    active = [run for run in runs if run.info.lifecycle_stage == "active"]
    assert [r.info.run_id for r in active if r.info.status == "FINISHED" and not above(r)] == [
        parent
    ]
    children = [run for run in active if above(run)]
    assert {above(run) for run in children} == {parent}
    assert {run.data.tags["digest"]: run.info.run_id for run in children} == logged
    assert len(children) == len(digests)
    assert {run.info.status for run in children} == {"FINISHED"}
    assert len({run.data.tags["trial"] for run in children}) == TRIALS
    assert sum(result["trials"][kind] for kind in ("complete", "screened_out", "failed")) == TRIALS
    assert {entry["mlflow_run_id"] for entry in result["front"]} <= set(logged.values())
    assert not list((tmp_path / "mlruns").rglob("*.new"))


def above(run) -> str:
    return run.data.tags.get("mlflow.parentRunId", "")
