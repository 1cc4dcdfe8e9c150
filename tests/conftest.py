"""One MLflow store for the whole session: making its database takes seconds."""

import pytest

from kvsharer_exp.measure.machine import settle

settle()  # as the command line does, before torch


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that send MLflow and the studies to a folder of the test session."""
    folder = tmp_path_factory.mktemp("mlruns")
    return [f"tracking.uri=sqlite:///{folder}/mlflow.db", f"tracking.folder={folder}"]
