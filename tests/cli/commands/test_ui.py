"""``ui`` with a store or a port it cannot use: one line that names the way out."""

import os
import shutil
import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from kvsharer_exp.cli.main import main
from kvsharer_exp.tracking.tracker import Tracker


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capfd, *words: str) -> str:
    assert main(["ui", f"hydra.run.dir={Path.cwd()}/run", *words]) == 2
    error = capfd.readouterr().err.strip()
    assert "\n" not in error
    assert len(error.removeprefix("kvsharer: ")) <= 200
    return error


def test_a_port_in_use(capfd) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} is in use: give another with ui.port=" in refused(
            capfd, f"ui.port={port}"
        )


def test_a_port_that_is_not_allowed(capfd, monkeypatch) -> None:
    def forbidden(self: socket.socket, address: tuple[str, int]) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", forbidden)
    said = refused(capfd, "ui.port=80")
    assert "port 80 cannot be used (Permission denied): give one above 1023" in said


def test_a_server_has_its_own_ui(capfd) -> None:
    assert "open it in a browser" in refused(capfd, "tracking.uri=http://127.0.0.1:5000")


def test_a_read_only_folder(capfd, monkeypatch) -> None:
    Path("mlruns").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "mlruns")
    said = refused(capfd, f"ui.port={free_port()}")
    assert "mlruns is read-only" in said and "give another tracking.uri" in said


@pytest.mark.slow  # starts the server: it knows its schema
def test_a_store_of_an_older_schema_names_the_upgrade(capfd, folder: Path, store) -> None:
    uri = store[0].partition("=")[2]
    Tracker.open(uri)
    shutil.copy(uri.removeprefix("sqlite:///"), folder / "old.db")
    with closing(sqlite3.connect(folder / "old.db")) as database, database:
        database.execute("update alembic_version set version_num = '3da73c924c2f'")
    said = refused(capfd, "tracking.uri=sqlite:///old.db", f"ui.port={free_port()}")
    assert "run `mlflow db upgrade sqlite:///old.db` once" in said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
