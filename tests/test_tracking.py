"""Runs as MLflow holds them, read back by a client of its own; the real server; bad stores."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from kvsharer_exp.errors import InputError
from kvsharer_exp.records import Footprint, TrialResult
from kvsharer_exp.sharing_map import SharingMap
from kvsharer_exp.tracking import Tracker, environment, ui_command

MAP = SharingMap((0, 1, 0, 3))


def trial(number: int = 0, status: str = "complete", **changes: object) -> TrialResult:
    values = {
        "params": {"num_shared": 1, "source_2": 0},
        "sharing_map": MAP,
        "scores": {"kl": 0.25, "perplexity/report": 20.0, "lm_eval/task/exact@1": 0.5},
        "footprint": Footprint(96, 0.75, 1000),
        "stage_reached": "fit",
        "seconds": 1.5,
        "score": -0.25,
        "origin": "paper greedy",
        **changes,
    }
    return TrialResult(number=number, status=status, **values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def uri(store: list[str]) -> str:
    return store[0].partition("=")[2]


@pytest.fixture(scope="module")
def tracker(uri: str) -> Tracker:
    folder = Path(uri.removeprefix("sqlite:///")).parent
    return Tracker.open(uri, "tests of tracking", str(folder / "artifacts"))


@pytest.fixture(scope="module")
def client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri)


def start(tracker: Tracker, **more: object) -> str:
    return tracker.start_run("parent", tags={"model": "m"}, params={"seed": "0"}, **more)


def test_a_trial_is_a_child_run_with_all_it_measured(tracker, client) -> None:
    parent = start(tracker)
    run = client.get_run(tracker.log_trial(parent, trial(3), {"hypervolume": 0.5}, name="a name"))
    assert run.info.run_name == "a name"
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["kv_source_layers"] == "0_1_0_3"
    assert run.data.tags["origin"] == "paper greedy"
    assert run.data.tags["front"] == "false"
    assert run.data.params["map"] == "0_1_0_3"
    assert run.data.params["source_2"] == "0"
    assert run.data.metrics == {
        "kl": 0.25,
        "perplexity/report": 20.0,
        "lm_eval/task/exact_1": 0.5,
        "kv_fraction": 0.75,
        "kv_bytes_per_token": 96,
        "num_shared": 1,
        "seconds": 1.5,
        "score": -0.25,
        "hypervolume": 0.5,
    }


def test_a_trial_that_was_not_scored_carries_no_score(tracker, client) -> None:
    parent = start(tracker)
    lost = trial(status="failed", scores={}, score=None, reason="RuntimeError: out of memory")
    run = client.get_run(tracker.log_trial(parent, lost, {}, name="x"))
    assert run.info.status == "FAILED"
    assert run.data.tags["reason"] == "RuntimeError: out of memory"
    assert "score" not in run.data.metrics
    screened = trial(status="screened_out", score=None)
    run = client.get_run(tracker.log_trial(parent, screened, {}, name="x"))
    assert (run.info.status, run.data.tags["status"]) == ("FINISHED", "screened_out")


def test_many_and_long_params_fit(tracker, client) -> None:
    params = {f"accept_{i}": "x" * 7000 for i in range(250)}
    run = client.get_run(tracker.log_trial(start(tracker), trial(params=params), {}, name="x"))
    assert len(run.data.params) == 251
    assert len(run.data.params["accept_0"]) == 6000


def test_numbers_that_are_none_are_named_not_logged(tracker, client) -> None:
    run_id = start(tracker)
    tracker.log_metrics(run_id, {"good": 1.0, "bad": float("nan"), "worse": float("inf")})
    run = client.get_run(run_id)
    assert run.data.metrics == {"good": 1.0}
    assert run.data.tags["not_finite"] == "bad, worse"


def test_a_run_continues_and_keeps_its_params(tracker, client) -> None:
    run_id = start(tracker)
    tracker.finish(run_id, "KILLED")
    assert client.get_run(run_id).info.status == "KILLED"
    again = tracker.start_run(
        "parent", tags={"more": "1"}, params={"seed": "1", "new": "2"}, run_id=run_id
    )
    run = client.get_run(again)
    assert again == run_id
    assert run.info.status == "RUNNING"
    assert run.data.params == {"seed": "0", "new": "2"}
    assert run.data.tags["more"] == "1"


def test_front_tags_follow_the_front(tracker, client) -> None:
    parent = start(tracker)
    one, two = (tracker.log_trial(parent, trial(i), {}, name="x") for i in range(2))
    tracker.mark_front([one])
    tracker.mark_front([two], before=[one])
    assert [client.get_run(r).data.tags["front"] for r in (one, two)] == ["false", "true"]


def test_artifacts_are_kept(tracker, client, tmp_path) -> None:
    run_id = start(tracker)
    tracker.log_text(run_id, "héllo", "front.md")
    path = client.download_artifacts(run_id, "front.md", str(tmp_path))
    assert Path(path).read_text(encoding="utf-8") == "héllo"


def test_a_map_is_found_by_its_run(tracker) -> None:
    parent = start(tracker)
    assert tracker.find_map(tracker.log_trial(parent, trial(), {}, name="x")) == MAP
    with pytest.raises(InputError, match="has no map"):
        tracker.find_map(parent)
    with pytest.raises(InputError, match="is not in this store"):
        tracker.find_map("f" * 32)
    assert tracker.exists(parent)
    assert not tracker.exists("f" * 32)


def test_bad_stores_are_one_line(tmp_path: Path) -> None:
    text = tmp_path / "text.db"
    text.write_text("this is no database, and it is longer than a header of SQLite would be " * 9)
    folder = tmp_path / "folder.db"
    folder.mkdir()
    for path in (text, folder, Path("/proc/none/x.db")):
        with pytest.raises(InputError, match="cannot be opened") as refused:
            Tracker.open(f"sqlite:///{path}", "x", str(tmp_path))
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) <= 300
    with pytest.raises(InputError, match="cannot be opened"):
        Tracker.open("nonsense://x", "x", str(tmp_path))


def test_environment_names_versions_and_commit() -> None:
    known = environment()
    assert known["torch"].startswith("2.")
    assert known["git_commit"]
    assert all(isinstance(value, str) for value in known.values())


def test_the_real_server_shows_the_runs(tracker, uri: str) -> None:
    run_id = start(tracker)
    tracker.log_text(run_id, "<h1>front</h1>", "front.html")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments, environment = ui_command(uri, port)
    server = subprocess.Popen(
        arguments,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    base = f"http://127.0.0.1:{port}"

    def get(path: str) -> bytes:
        with urllib.request.urlopen(base + path, timeout=10) as answer:
            return answer.read()

    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                assert get("/health") == b"OK"
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < deadline
                time.sleep(0.5)
        assert run_id.encode() in get(f"/api/2.0/mlflow/runs/get?run_id={run_id}")
        shown = get(f"/get-artifact?path=front.html&run_uuid={run_id}")
        assert shown == b"<h1>front</h1>"
        assert b"<html" in get("/").lower()
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
