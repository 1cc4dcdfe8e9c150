"""Public fault 9: no run stays RUNNING that nobody writes to any more."""

import itertools
from pathlib import Path

import pytest
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient

from kvsharer_exp.tracking import leftovers
from kvsharer_exp.tracking.leftovers import STUDY_KEY
from kvsharer_exp.tracking.tracker import Tracker
from tests.tracking.test_tracking import trial


@pytest.fixture
def client(store: list[str]) -> MlflowClient:
    return MlflowClient(tracking_uri=store[0].partition("=")[2])


@pytest.fixture
def tracker(client: MlflowClient) -> Tracker:
    folder = Path(client.tracking_uri.removeprefix("sqlite:///")).parent
    return Tracker.open(client.tracking_uri, "leftovers", str(folder / "artifacts"))


def start(tracker: Tracker, key: str) -> str:
    return tracker.start_run("parent", tags={STUDY_KEY: key}, params={})


def open_child(client: MlflowClient, parent: str, trial: str = "") -> str:
    """A child run as a kill in the middle of `Tracker.log_trial` leaves it."""
    experiment = client.get_run(parent).info.experiment_id
    tags = {"mlflow.parentRunId": parent, **({"trial": trial} if trial else {})}
    return client.create_run(experiment, tags=tags).info.run_id


def status(client: MlflowClient, *run_ids: str) -> list[str]:
    return [client.get_run(run_id).info.status for run_id in run_ids]


@pytest.mark.parametrize("how", ["KILLED", "FAILED"])
def test_a_run_that_ends_early_takes_its_open_child_with_it(tracker, client, how: str) -> None:
    parent, other = start(tracker, "a"), start(tracker, "b")
    done = tracker.log_trial(parent, trial(), {})
    child, foreign = open_child(client, parent, "1"), open_child(client, other, "1")
    tracker.finish(parent, how)
    assert status(client, parent, done, child) == [how, "FINISHED", "KILLED"]
    assert status(client, other, foreign) == ["RUNNING", "RUNNING"]
    tracker.finish_all("FINISHED")
    assert status(client, parent, other) == [how, "FINISHED"]


def test_a_run_that_is_interrupted_while_it_begins_is_ended_too(
    tracker, client, monkeypatch
) -> None:
    def interrupt(run_id: str, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tracker._client, "log_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tracker.start_run("parent", tags={}, params={"a": "b"})
    (run_id,) = tracker._sampled
    tracker.finish_all("KILLED")
    assert status(client, run_id) == ["KILLED"]


def test_the_next_start_of_a_study_ends_what_the_last_one_left(
    tracker, client, monkeypatch
) -> None:
    monkeypatch.setattr(leftovers, "_PAGE", 2)
    killed = [start(tracker, "mine") for _ in range(3)]
    children = [open_child(client, killed[0], str(number)) for number in range(3)]
    foreign, finished = start(tracker, "another"), start(tracker, "mine")
    tracker.finish(finished)
    continued = start(tracker, "mine")
    known, unknown = (tracker.log_trial(continued, trial(number), {}) for number in range(2))
    half, own = open_child(client, continued, "2"), open_child(client, continued)
    tracker.close_left_open("mine", continued, [known, "f" * 32])
    for before, after in itertools.pairwise([*killed, continued]):
        assert client.get_run(before).data.tags["continued_by"] == after
        assert client.get_run(after).data.tags["continues"] == before
    assert status(client, *killed, *children, half, own) == ["KILLED"] * 8
    assert status(client, foreign, continued, finished) == ["RUNNING", "RUNNING", "FINISHED"]
    experiment = client.get_run(continued).info.experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{continued}'")
    assert {run.info.run_id for run in found} == {known, own}  # what is no trial is left alone
    deleted = client.search_runs([experiment], run_view_type=ViewType.DELETED_ONLY)
    assert {run.info.run_id for run in deleted} == {unknown, half}
    tracker.finish_all("FINISHED")
