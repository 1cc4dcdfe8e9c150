"""Runs as MLflow holds them, read back by a client of its own; the real server; bad stores."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest
from mlflow.tracking import MlflowClient

from kvsharer_exp.tracking.environment import environment
from kvsharer_exp.tracking.run_plans import map_of_run
from kvsharer_exp.tracking.server import ui_command
from kvsharer_exp.tracking.tracker import Tracker
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import TrialResult

MAP = SharingMap((0, 1, 0, 3))


def trial(number: int = 0, status: str = "complete", **changes: object) -> TrialResult:
    values = {
        "params": {"num_shared": 1, "source_2": 0},
        "plan": MAP,
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
    assert run.data.params == {"map": "0_1_0_3", "origin": "paper greedy"}
    assert json.loads(run.data.tags["drawn"]) == {"num_shared": 1, "source_2": 0}
    assert run.data.tags["trial"] == "3"
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
    run = client.get_run(tracker.start_run("parent", tags={}, params=params))
    assert len(run.data.params) == 250
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
    assert map_of_run(tracker.runs, tracker.log_trial(parent, trial(), {}, name="x")) == MAP
    with pytest.raises(InputError, match="has no plan or map"):
        map_of_run(tracker.runs, parent)
    with pytest.raises(InputError, match="is not in this store"):
        map_of_run(tracker.runs, "f" * 32)
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
        assert len(str(refused.value)) <= 200
    with pytest.raises(InputError, match="cannot be opened"):
        Tracker.open("nonsense://x", "x", str(tmp_path))


def test_a_trial_costs_one_create_one_batch_and_one_end(tracker, monkeypatch) -> None:
    parent, calls = start(tracker), []
    for name in ("create_run", "log_batch", "set_terminated", "set_tag", "get_run"):
        inner = getattr(tracker._client, name)

        def counted(*args, name=name, inner=inner, **kwargs):
            calls.append(name)
            return inner(*args, **kwargs)

        monkeypatch.setattr(tracker._client, name, counted)
    lost = {"kl": float("inf"), "cosine": 0.5}
    tracker.log_trial(parent, trial(scores=lost), {}, name="x")
    assert calls == ["create_run", "log_batch", "set_terminated"]


def test_a_trial_names_the_scores_it_could_not_log(tracker, client) -> None:
    lost = {"kl": float("inf"), "perplexity/report": float("nan"), "cosine": 0.5}
    run = client.get_run(tracker.log_trial(start(tracker), trial(scores=lost), {}))
    assert "kl" not in run.data.metrics
    assert run.data.tags["not_finite"] == "kl, perplexity/report"
    assert run.data.tags["num_shared"] == "1"
    assert run.info.run_name == "1/4 shared"


@pytest.mark.parametrize("name", ["a@b", "a//b", "../a", "/a", "a/", "x" * 300, "..", "acc,none"])
def test_every_name_and_long_text_is_taken(tracker, client, name: str) -> None:
    run_id = start(tracker)
    tracker.log_metrics(run_id, {name: 0.25})
    assert list(client.get_run(run_id).data.metrics.values()) == [0.25]
    failed = trial(scores={name: 1}, status="failed", score=None, reason="y" * 9000)
    child = client.get_run(tracker.log_trial(run_id, failed, {}))
    assert 1 in child.data.metrics.values()
    assert len(child.data.tags["reason"]) == 8000
    assert len(client.get_run(tracker.start_run("p", tags={}, params={name: "1"})).data.params) == 1


def test_a_front_that_left_with_a_deleted_run_is_no_error(tracker, client) -> None:
    parent = start(tracker)
    one, two = (tracker.log_trial(parent, trial(i), {}) for i in range(2))
    client.delete_run(one)
    tracker.mark_front([two], before=[one, "f" * 32])
    assert client.get_run(two).data.tags["front"] == "true"


def test_artifacts_go_into_folders(tracker, client, tmp_path) -> None:
    run_id = start(tracker)
    tracker.log_bytes(run_id, b"\x89PNG", "pictures/front.png")
    tracker.log_dict(run_id, {"a": [1]}, "front.json")
    picture = client.download_artifacts(run_id, "pictures/front.png", str(tmp_path))
    assert Path(picture).read_bytes() == b"\x89PNG"
    values = client.download_artifacts(run_id, "front.json", str(tmp_path))
    assert json.loads(Path(values).read_text(encoding="utf-8")) == {"a": [1]}


def test_single_values_are_logged_at_step_zero_so_that_the_ui_draws_bars(tracker, client) -> None:
    run_id = tracker.log_trial(start(tracker), trial(7), {})
    assert {m.step for m in client.get_metric_history(run_id, "kl")} == {0}


def test_a_front_map_is_a_logged_model_with_its_file_once(tracker, client, tmp_path) -> None:
    run_id = tracker.log_trial(start(tracker), trial(), {})
    for value in (20.0, 21.0):
        tracker.log_map(run_id, MAP, {"perplexity/report": value}, name="smollm2 · 1/4 shared")
    run = client.get_run(run_id)
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.name, str(model.status)) == ("smollm2 - 1-4 shared", "READY")
    assert model.params == {"kv_source_layers": "0_1_0_3", "digest": MAP.digest}
    assert {metric.key for metric in model.metrics} == {"perplexity/report"}
    assert run.data.metrics["perplexity/report"] == 21.0
    assert [made.path for made in client.list_logged_model_artifacts(model.model_id)] == [
        "map.json"
    ]
    file = Path(unquote(urlsplit(model.artifact_location).path)) / "map.json"
    assert SharingMap.parse(file) == MAP


def test_data_sets_are_named_with_their_digests(tracker, client) -> None:
    run_id = start(tracker)
    parts = {"calibration": ("wikipedia", "a" * 12), "report": ("/far/away/mine.txt", "b" * 12)}
    tracker.log_datasets(run_id, parts)
    tracker.log_datasets(run_id, parts)  # a run that is continued
    inputs = client.get_run(run_id).inputs.dataset_inputs
    found = {made.tags[0].value: (made.dataset.name, made.dataset.digest) for made in inputs}
    assert found == {"calibration": ("wikipedia", "a" * 12), "report": ("mine.txt", "b" * 12)}


def test_a_saved_view_is_found_by_the_address_it_gives(tracker, client) -> None:
    parent = start(tracker)
    member = tracker.log_trial(parent, trial(), {})
    tracker.log_trial(parent, trial(1), {})
    tracker.mark_front([member])
    tracker.save_view(parent, [f"lm_eval/task_{i}/acc_norm" for i in range(300)], name="many")
    address = tracker.save_view(parent, ["kl", "perplexity/report"], name="a view")
    page, _, query = address.partition("?")
    options = dict(parse_qsl(query))
    experiment = client.get_run(parent).info.experiment_id
    assert page == f"http://127.0.0.1:5000/#/experiments/{experiment}/runs"
    tags = client.get_experiment(experiment).tags
    held = json.loads(tags["mlflow.sharedViewState." + options["viewStateShareKey"]])
    assert held["name"] == "a view"
    state = json.loads(held["state"])
    order = f"{state['orderByKey']} {'ASC' if state['orderByAsc'] else 'DESC'}"
    runs = client.search_runs([experiment], state["searchFilter"], order_by=[order])
    assert [run.info.run_id for run in runs] == [member]


def test_a_long_run_samples_the_machine_and_a_short_one_does_not(
    tracker, client, monkeypatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    experiment = client.get_run(start(tracker)).info.experiment_id
    found = []
    for after in (0.0, 600.0):
        timed = Tracker(client, experiment, sample_after_seconds=after)
        run_id = start(timed)
        deadline = time.monotonic() + 20
        while after == 0 and time.monotonic() < deadline:
            if any(key.startswith("system/") for key in client.get_run(run_id).data.metrics):
                break
            time.sleep(0.2)
        timed.finish(run_id)
        found.append([k for k in client.get_run(run_id).data.metrics if k.startswith("system/")])
        assert client.get_run(run_id).info.status == "FINISHED"
    assert "system/system_memory_usage_percentage" in found[0]
    assert found[1] == []
    assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}


def test_a_deleted_experiment_is_named_with_the_way_back(uri, client, tmp_path) -> None:
    Tracker.open(uri, "deleted", str(tmp_path))
    client.delete_experiment(client.get_experiment_by_name("deleted").experiment_id)
    with pytest.raises(InputError, match="mlflow experiments restore -x"):
        Tracker.open(uri, "deleted", str(tmp_path))


def test_a_store_of_another_schema_names_the_upgrade(tracker, uri, tmp_path) -> None:
    old = tmp_path / "old.db"
    shutil.copy(uri.removeprefix("sqlite:///"), old)
    with closing(sqlite3.connect(old)) as database, database:
        database.execute("update alembic_version set version_num = '3da73c924c2f'")
    shown = f"sqlite:///{old}" if len(str(old)) < 80 else "<tracking.uri>"
    with pytest.raises(InputError, match=f"run `mlflow db upgrade {shown}` once") as refused:
        Tracker.open(f"sqlite:///{old}", "x", str(tmp_path))
    assert len(str(refused.value)) <= 200


def test_a_store_that_is_read_only_is_refused_before_a_run(tracker, uri, monkeypatch) -> None:
    file = Path(uri.removeprefix("sqlite:///"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != file)
    with pytest.raises(InputError, match=f"{file.name} is read-only"):
        Tracker.open(uri, "tests of tracking")


def test_a_store_in_use_is_refused(tracker, uri: str) -> None:
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as other:
        other.execute("begin exclusive")
        with pytest.raises(InputError, match="database is locked"):
            Tracker.open(uri, "tests of tracking")
    assert Tracker.open(uri, "tests of tracking")


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "postgresql+nodriver://x/y"])
def test_a_server_out_of_reach_and_a_missing_driver_are_one_line(uri: str) -> None:
    before = dict(os.environ)
    with pytest.raises(InputError, match="cannot be opened") as refused:
        Tracker.open(uri)
    assert len(str(refused.value)) <= 200
    assert {k: v for k, v in os.environ.items() if "HTTP" in k} == {
        k: v for k, v in before.items() if "HTTP" in k
    }


@pytest.mark.slow
def test_a_new_store_is_made_in_silence_and_nothing_global_is_left(tmp_path: Path) -> None:
    code = """
import os, sys
from kvsharer_exp.tracking.tracker import Tracker
assert "mlflow" not in sys.modules
tracker = Tracker.open("sqlite:///deep/mlflow.db", artifacts="deep/artifacts")
run = tracker.start_run("a", tags={}, params={})
tracker.log_text(run, "x", "x.txt")
import mlflow
assert not mlflow.is_tracking_uri_set() and mlflow.active_run() is None
assert "MLFLOW_TRACKING_URI" not in os.environ
"""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**inherited, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(list(tmp_path.rglob("x.txt"))) == 1
    assert not (tmp_path / "mlruns").exists()


def test_environment_names_versions_and_commit() -> None:
    known = environment()
    assert known["torch"].startswith("2.")
    assert known["git_commit"]
    assert all(isinstance(value, str) for value in known.values())


def test_the_real_server_shows_the_runs(tracker, uri: str, tmp_path: Path) -> None:
    run_id = start(tracker)
    tracker.log_text(run_id, "<h1>front</h1>", "front.html")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments, environment = ui_command(uri, port)
    server = subprocess.Popen(
        arguments,
        env=environment,
        cwd=tmp_path,
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
        # The same calls, with the server as the store.
        remote = Tracker.open(base, "through the server")
        parent = start(remote)
        child = remote.log_trial(parent, trial(), {}, name="x")
        remote.log_text(child, "far", "far.txt")
        remote.log_map(child, MAP, {"kl": 0.25}, name="x")
        remote.log_datasets(parent, {"report": ("wikipedia", "a" * 12)})
        assert remote.save_view(parent, ["kl"], name="x").startswith(f"{base}/#/experiments/")
        assert map_of_run(remote.runs, child) == MAP
        assert not remote.exists("f" * 32)
        assert get(f"/get-artifact?path=far.txt&run_uuid={child}") == b"far"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
