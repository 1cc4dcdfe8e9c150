"""One PostgreSQL server for all tests of this folder, and a database for each."""

import re
from collections.abc import Iterator

import pytest

from tests.servers.mlflow_server import MlflowServer, running_server
from tests.servers.postgres import PASSWORD, Cluster, running_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def database(cluster: Cluster, request: pytest.FixtureRequest, monkeypatch) -> str:
    """The address of an empty database; the password is where psycopg looks for it."""
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    name = re.sub(r"\W+", "_", request.node.name)[-50:].lower()
    return cluster.make_database(name)


@pytest.fixture(scope="session")
def mlflow_server(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MlflowServer]:
    """One MLflow server for all tests; it takes seconds to start."""
    folder = tmp_path_factory.mktemp("mlflow-server")
    with running_server(cluster.make_database("mlflow"), folder) as server:
        yield server
