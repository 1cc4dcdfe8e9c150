"""An MLflow store for the tests of a file, and the tracker of an experiment of theirs."""

from pathlib import Path

import pytest

from kvsharer_exp.tracking.tracker import Tracker


@pytest.fixture(scope="module")
def uri(store: list[str]) -> str:
    return store[0].partition("=")[2]


@pytest.fixture(scope="module")
def tracker(uri: str, request: pytest.FixtureRequest) -> Tracker:
    folder = Path(uri.removeprefix("sqlite:///")).parent
    name = request.module.__name__.rpartition("test_")[2]
    return Tracker.open(uri, f"tests of {name}", str(folder / "artifacts"))
