"""A client that waits for a server: when it asks again, when it gives up, and what it says."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException, RestException
from requests.exceptions import ConnectionError, HTTPError

from kvsharer_exp.tracking.patience import MlflowAwayError, PatientClient, is_away

URI = "http://me:hush@127.0.0.1:5000"
REFUSED = "API request to x failed with exception [Errno 111] Connection refused"
LOST = "API request to x failed with exception Remote end closed connection without response"


class Server:
    """Answers when it is up, at a time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now, self.back_at, self.error = 0.0, 0.0, REFUSED
        self.asked: list[float] = []
        self.client = PatientClient(
            SimpleNamespace(tracking_uri=URI, get_run=self._get, create_run=self._get),
            clock=lambda: self.now,
            sleep=self._sleep,
        )

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def _get(self, name: str) -> str:
        self.asked.append(self.now)
        if self.now < self.back_at:
            raise MlflowException(self.error)
        return f"run {name}"


@pytest.fixture
def server(monkeypatch) -> Server:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")  # restored when the test ends
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    return Server()


def test_a_call_is_made_again_with_longer_and_longer_waits(server, caplog) -> None:
    server.back_at = 10.0
    with caplog.at_level(logging.WARNING):
        assert server.client.get_run("a") == "run a"
    assert server.asked == [0, 1, 3, 7, 15]
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(" (")[0] for line in said] == [
        "MLflow at http://me:***@127.0.0.1:5000 does not answer",
        "MLflow at http://me:***@127.0.0.1:5000 answers again",
    ]


def test_it_gives_up_after_a_minute_and_then_waits_no_more(server) -> None:
    server.back_at = 1000.0
    with pytest.raises(MlflowAwayError, match=r"does not answer \(Connection refused\): start it"):
        server.client.get_run("a")
    assert server.asked == [0, 1, 3, 7, 15, 31]
    for _ in range(3):
        with pytest.raises(MlflowAwayError):
            server.client.get_run("a")
    assert len(server.asked) == 6
    server.now = 2000.0
    assert server.client.get_run("a") == "run a"
    server.back_at = 2010.0
    assert server.client.get_run("b") == "run b"  # it waits as at first


def test_within_waiting_nobody_waits_longer(server) -> None:
    server.back_at = 5.0
    with server.client.waiting(0.0), pytest.raises(MlflowAwayError):
        server.client.get_run("a")
    assert server.now == 0.0
    assert server.client.get_run("a") == "run a"


def test_what_the_server_may_have_made_is_not_made_again(server) -> None:
    server.back_at = 0.5
    assert server.client.create_run("a") == "run a"
    server.back_at, server.error = server.now + 0.5, LOST
    with pytest.raises(MlflowAwayError):
        server.client.create_run("a")


@pytest.mark.parametrize(
    ("make", "away"),
    [
        (lambda: MlflowException(REFUSED), True),
        (lambda: RestException({"error_code": "INTERNAL_ERROR", "message": "database"}), True),
        (lambda: RestException({"error_code": "TEMPORARILY_UNAVAILABLE"}), True),
        (lambda: RestException({"error_code": "RESOURCE_DOES_NOT_EXIST"}), False),
        (lambda: MlflowException("a fault of this code"), False),
        (lambda: ConnectionError("away"), True),
        (lambda: HTTPError(response=SimpleNamespace(status_code=503)), True),
        (lambda: HTTPError(response=SimpleNamespace(status_code=404)), False),
        (lambda: ValueError("another"), False),
    ],
)
def test_what_counts_as_away(make: Callable[[], Any], away: bool) -> None:
    assert is_away(make()) is away


def test_other_errors_pass_at_once(server) -> None:
    server.client._inner.get_run = lambda name: 1 / 0
    with pytest.raises(ZeroDivisionError):
        server.client.get_run("a")
