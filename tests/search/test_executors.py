"""Executors: the same results wherever a plan is scored, and what becomes of a lost worker."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvsharer_exp.search.coordinator import run_search
from kvsharer_exp.search.execution import processes, worker
from kvsharer_exp.search.execution.base import DeviceLostError, Executor, Task, attempt
from kvsharer_exp.search.execution.local import LocalExecutor
from kvsharer_exp.search.execution.pool import Lost, Pool, Ready
from kvsharer_exp.search.execution.ray_cluster import RayCrew, cluster
from kvsharer_exp.search.outcome import Bar, Outcome
from kvsharer_exp.search.study import open_study
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.trial import TrialResult
from tests.search import cheap
from tests.search.cheap_scores import make_score


def searched(folder: Path, executor: Executor, n_trials: int, **more: Any) -> list[TrialResult]:
    with open_study("s", storage=None, folder=folder) as store:
        asked = cheap.search(sampler=more.pop("sampler", "random"))
        return run_search(store, asked, executor, n_trials=n_trials, **more)


def local(folder: Path, **told: Any) -> LocalExecutor:
    return LocalExecutor(make_score(json.dumps({"log": str(folder / "local.txt"), **told})))


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with cluster("local"):
        assert signal.getsignal(signal.SIGTERM) == on_sigterm  # ray.init puts its own there
        yield


def ray_crew(folder: Path, **told: Any) -> RayCrew:
    settings = json.dumps({"log": str(folder / "scored.txt"), **told})
    return RayCrew(cheap.MAKE, settings, num_cpus=0.5, num_gpus=0)


@pytest.fixture(params=["processes", pytest.param("ray", marks=pytest.mark.slow)])
def crew(request: pytest.FixtureRequest):
    """Makes a crew of worker processes, or of Ray actors."""
    if request.param == "ray":
        request.getfixturevalue("ray_here")
        return ray_crew
    return cheap.crew


@pytest.mark.parametrize("kind", ["processes", "ray"])
def test_one_worker_finds_what_this_process_finds(kind: str, tmp_path: Path, request) -> None:
    if kind == "ray":
        request.getfixturevalue("ray_here")
    here = searched(tmp_path / "a", local(tmp_path), 30, sampler="tpe")
    with Pool((ray_crew if kind == "ray" else cheap.crew)(tmp_path), 1) as pool:
        there = searched(tmp_path / "b", pool, 30, sampler="tpe")
    assert cheap.plain(there) == cheap.plain(here)
    assert cheap.scored(tmp_path) == [str(result.plan) for result in there]


def test_nobody_waits_for_a_slow_plan(crew, tmp_path: Path) -> None:
    with Pool(crew(tmp_path, slow=[1], seconds=0.01), 2) as pool:
        found = searched(tmp_path, pool, 20)
    slow = cheap.scored(tmp_path)[1]
    assert [str(r.plan) for r in found].index(slow) > 10
    assert [r.number for r in found] == list(range(20))
    assert len(cheap.scored(tmp_path)) == len(set(cheap.scored(tmp_path))) == 20


def test_a_lost_workers_plan_is_scored_again_on_a_new_one(crew, tmp_path: Path) -> None:
    said: list[str] = []
    with Pool(crew(tmp_path, dies_once=[0, 3]), 2, say=said.append) as pool:
        found = searched(tmp_path, pool, 10)
    assert {r.status for r in found} == {"complete"}
    assert len(found) == 10
    began = cheap.scored(tmp_path)
    assert len(began) == 12 and len(set(began)) == 10
    assert sum("its plan is scored again" in line for line in said) == 2


def test_a_plan_that_loses_every_worker_fails_with_the_reason(crew, tmp_path: Path) -> None:
    with Pool(crew(tmp_path, dies=[2]), 1) as pool:
        found = searched(tmp_path, pool, 6)
    assert [r.status for r in found] == ["complete"] * 2 + ["failed"] + ["complete"] * 3
    assert found[2].reason
    assert found[2].score is None
    assert cheap.scored(tmp_path).count(str(found[2].plan)) == 3


def test_a_worker_that_hangs_is_replaced(crew, tmp_path: Path) -> None:
    with Pool(crew(tmp_path, hangs=[1]), 1, trial_timeout=0.5) as pool:
        found = searched(tmp_path, pool, 4)
    assert [r.status for r in found] == ["complete", "failed", "complete", "complete"]
    assert found[1].reason == "no result after executor.trial_timeout=0.5 seconds"


def test_a_worker_that_says_what_is_no_outcome_is_replaced(tmp_path: Path) -> None:
    with Pool(cheap.crew(tmp_path, overflows=[1]), 1) as pool:
        found = searched(tmp_path, pool, 3)
    assert [r.status for r in found] == ["complete", "failed", "complete"]
    assert "it says what is no outcome: " in found[1].reason
    assert "a finite number" in found[1].reason


def test_a_plan_that_fails_costs_no_worker(crew, tmp_path: Path) -> None:
    said: list[str] = []
    with Pool(crew(tmp_path, fails=[1]), 1, say=said.append) as pool:
        found = searched(tmp_path, pool, 3)
    assert found[1].reason == "RuntimeError: out of memory"
    assert not said


def test_a_worker_that_loses_its_device_ends_and_its_plan_is_scored_again(crew, tmp_path) -> None:
    """After such an error CUDA fails whatever the process asks of it."""
    said: list[str] = []
    with Pool(crew(tmp_path, breaks_once=[1]), 1, say=said.append) as pool:
        found = searched(tmp_path, pool, 4)
    assert {r.status for r in found} == {"complete"}
    (line,) = said
    assert "DeviceLostError: CUDA error: device-side assert triggered: run again" in line
    assert line.endswith("its plan is scored again")


def test_this_process_ends_the_run_when_it_loses_the_device(tmp_path: Path) -> None:
    lost = "^CUDA error: device-side assert triggered: run again, "
    with pytest.raises(DeviceLostError, match=lost):
        searched(tmp_path, local(tmp_path, breaks_once=[1]), 4)
    assert len((tmp_path / "local.txt").read_text().split()) == 2
    found = searched(tmp_path, local(tmp_path), 4)  # run again
    assert {r.status for r in found} == {"complete"}


class AcceleratorError(RuntimeError):
    """As torch has it; its text need not name CUDA."""


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (AcceleratorError("an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (AcceleratorError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), False),
    ],
)
def test_a_device_without_memory_is_not_lost(error: RuntimeError, is_lost: bool) -> None:
    def score(plan: KVPlan, bar: Bar) -> Outcome:
        raise error

    task = Task(0, KVPlan.full(3), Bar())
    if is_lost:
        with pytest.raises(DeviceLostError):
            attempt(score, task)
    else:
        assert attempt(score, task).outcome.status == "failed"


def test_a_worker_whose_log_is_gone_is_replaced_too(tmp_path: Path) -> None:
    said: list[str] = []

    def on_result(result: TrialResult) -> None:
        (tmp_path / "workers" / "worker-0.log").unlink(missing_ok=True)

    with Pool(cheap.crew(tmp_path, dies_once=[1]), 1, say=said.append) as pool:
        found = searched(tmp_path, pool, 3, on_result=on_result)
    assert {r.status for r in found} == {"complete"}
    assert "worker-0.log is gone): its plan is scored again" in said[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loss_is_told_even_where_nobody_can_say_how_it_came(tmp_path, monkeypatch) -> None:
    def fault(code: int, log: Path) -> str:
        raise PermissionError(log)

    monkeypatch.setattr(processes, "_how_it_ended", fault)
    with Pool(cheap.crew(tmp_path, dies=[1]), 1) as pool:
        found = searched(tmp_path, pool, 3)
    assert [r.status for r in found] == ["complete", "failed", "complete"]
    assert found[1].reason == "nobody could read what it says"


SHELLS = {
    r"printf '\377\n'; cat": "it says what is no outcome: ",
    "exec 1>&-; cat > /dev/null": "it says no more, and does not end",
}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_worker_that_only_babbles_or_is_mute_is_lost(shell: str, tmp_path, monkeypatch) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{shell}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(processes, "_PATIENCE", 0.2)
    crew = cheap.crew(tmp_path)
    started = crew.start(0)
    try:
        ((worker, news),) = crew.news(20)
    finally:
        crew.stop(started)
    assert worker is started
    assert isinstance(news, Lost) and news.reason.startswith(SHELLS[shell])


def test_a_process_that_cannot_be_killed_keeps_nobody(tmp_path: Path, monkeypatch, caplog) -> None:
    """One that sleeps in the system, as of a file server that is gone."""
    monkeypatch.setattr(processes, "_PATIENCE", 0.2)
    crew = cheap.crew(tmp_path, seconds=1000)
    worker = crew.start(0)
    assert crew.news(60) == [(worker, Ready())]
    crew.send(worker, Task(0, KVPlan.full(3), Bar()))
    with monkeypatch.context() as patch:
        patch.setattr(worker.process, "kill", lambda: None)
        crew.stop(worker)
    assert "worker 0 was killed and does not end: it is left alone" in caplog.text
    crew.stop(worker)
    assert worker.process.poll() is not None


def test_a_worker_that_refuses_or_cannot_start_ends_the_run(crew, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the model is not here: put it there"):
        with Pool(crew(tmp_path, refuses=True), 1) as pool:
            searched(tmp_path / "a", pool, 3)
    with pytest.raises(RuntimeError, match=r"worker 0 does not start: .*a typo"):
        with Pool(crew(tmp_path, crashes=True), 1) as pool:
            searched(tmp_path / "b", pool, 3)


def test_four_workers_score_no_plan_twice(tmp_path: Path) -> None:
    with Pool(cheap.crew(tmp_path), 4) as pool:
        found = searched(tmp_path, pool, 500)
        with open_study("s", storage=None, folder=tmp_path) as store:
            assert store.count_trials() == 500 + store.count_cached()
    assert len({r.plan.digest for r in found}) == len(found) == 500
    assert sorted(cheap.scored(tmp_path)) == sorted(str(r.plan) for r in found)
    assert sorted(r.number for r in found)[0] == 0


def test_a_stop_finishes_what_is_under_way_and_the_next_run_goes_on(tmp_path: Path) -> None:
    asked: list[bool] = []
    with Pool(cheap.crew(tmp_path, seconds=0.05), 2) as pool:
        first = searched(
            tmp_path, pool, 40, on_result=asked.append, is_stopped=lambda: len(asked) > 5
        )
        assert 6 <= len(first) <= 8
        assert len(cheap.scored(tmp_path)) == len(first)  # nothing was begun for nothing
        found = searched(tmp_path, pool, 40)
    assert found[: len(first)] == first
    assert len(cheap.scored(tmp_path)) == 40


KILLED = """
import sys
from pathlib import Path
from kvsharer_exp.search.execution.pool import Pool
from kvsharer_exp.search.coordinator import run_search
from kvsharer_exp.search.study import open_study
from tests.search import cheap
folder = Path(sys.argv[1])
with open_study("s", storage=None, folder=folder) as store:
    with Pool(cheap.crew(folder, seconds=0.2), 2) as pool:
        run_search(store, cheap.search(), pool, n_trials=1000)
"""


def test_workers_end_with_a_coordinator_that_is_killed_and_their_plans_are_first(tmp_path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=cheap.ROOT)
    log = tmp_path / "scored.txt"
    while not log.exists() or len(cheap.scored(tmp_path)) < 7:
        time.sleep(0.02)
        assert process.poll() is None
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive
    with open_study("s", storage=None, folder=tmp_path) as store:
        known = {str(result.plan) for result in store.results()}
    lost = [text for text in cheap.scored(tmp_path) if text not in known]
    assert 1 <= len(lost) <= 3
    found = searched(tmp_path, local(tmp_path), len(known) + len(lost))
    assert {str(r.plan) for r in found[len(known) :]} == set(lost)


def test_a_worker_is_settled_as_the_command_line_is(tmp_path: Path, monkeypatch) -> None:
    """Freed memory that glibc gives back makes a worker slower than this process by a tenth."""
    calls: list[str] = []
    monkeypatch.setattr(worker, "settle", lambda: calls.append("settled"))
    worker.make_score(cheap.MAKE, json.dumps({"log": str(tmp_path / "scored.txt")}))
    assert calls == ["settled"]
