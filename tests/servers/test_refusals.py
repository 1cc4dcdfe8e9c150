"""What cannot be used is one line with exit code 2, and a password is kept and shown nowhere."""

import base64
import os
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from kvsharer_exp.cli.main import main
from kvsharer_exp.search.study import open_study
from kvsharer_exp.search.study_store import VERSION
from kvsharer_exp.values.ports import free_port
from tests.cli.session.test_killed_sweeps import QUICK
from tests.refusals import check_refusal

SECRET = "Zw7-hush"


@pytest.fixture
def refused(tmp_path: Path, store: list[str], monkeypatch, capfd):
    """Run a sweep that must be refused; the secret must be in no file and in no output."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, names: str, places: list[str] = store) -> None:
        assert main(["sweep", *QUICK, *places, "study.name=s", "hydra.run.dir=run", *words]) == 2
        output = capfd.readouterr()
        check_refusal(output.err, names)
        folders = [tmp_path / "run", Path(store[1].partition("=")[2])]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        kept = b"".join(path.read_bytes() for path in files)
        assert SECRET not in output.out + output.err
        assert SECRET.encode() not in kept

    return run


INSIDE = {
    f"study.storage=postgresql://me:{SECRET}@127.0.0.1/d": "PGPASSWORD or put it into ~/.pgpass",
    f"study.storage=postgresql://me:a/b@{SECRET}@127.0.0.1/d": "study.storage holds a password",
    f"study.storage=postgresql://127.0.0.1/d?user=me&password={SECRET}": "study.storage holds",
    f"++study.storage='postgresql://me:{SECRET}@127.0.0.1/d'": "study.storage holds a password",
    f"study={{storage:'postgresql://me:{SECRET}@127.0.0.1/d'}}": "study holds a password",
    f"stuyd.storage=postgresql://me:{SECRET}@127.0.0.1/d": "stuyd.storage holds a password",
    f"postgresql://me:{SECRET}@127.0.0.1/d": "an address holds a password",
    f"tracking.uri=http://me:{SECRET}@127.0.0.1:5000": "set MLFLOW_TRACKING_USERNAME and",
    f"tracking.uri=postgresql://me:{SECRET}@127.0.0.1/d": "tracking.uri holds a password",
}


@pytest.mark.parametrize("word", INSIDE)
def test_a_password_on_the_command_line(refused, tmp_path, word: str) -> None:
    refused(word, names=INSIDE[word])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "word",
    [
        *("tracking.uri=http://127.0.0.1:5000/a@b", "study.storage=postgresql://me@127.0.0.1:5/d"),
        *("generate.prompt='http://a:b@c'", "study.storage=postgresql://me@127.0.0.1/d?host=/run"),
    ],
)
def test_an_address_without_one_is_taken(word: str, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", word, "--cfg", "job"]) == 0
    assert word.partition("=")[2].strip("'") in capfd.readouterr().out


@pytest.mark.parametrize("group", ["study: {storage", "tracking: {uri"])
def test_a_password_in_a_file_is_not_copied(refused, tmp_path, group: str) -> None:
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    address = f"'postgresql://me:{SECRET}@127.0.0.1/d'"
    (folder / "mine.yaml").write_text(f"# @package _global_\n{group}: {address}}}\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("the folder of a refused command goes, but for this")
    words = (f"--config-dir={folder.parent}", "experiment=mine")
    refused(*words, names=f"{group.replace(': {', '.')} holds a password", places=[])
    assert "postgresql://me:***@" in (tmp_path / "run/.hydra/config.yaml").read_text()


def test_nor_is_it_by_a_multirun(refused, tmp_path) -> None:
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    address = f"postgresql://me:{SECRET}@127.0.0.1/d"
    (folder / "mine.yaml").write_text(
        f"# @package _global_\nstudy:\n  storage: {address}\n", encoding="utf-8"
    )
    words = (f"--config-dir={folder.parent}", "experiment=mine", "-m", "hydra.sweep.dir=run")
    refused(*words, names="study.storage holds a password")
    assert "postgresql://me:***@" in (tmp_path / "run/multirun.yaml").read_text()


def test_a_password_from_the_environment_is_refused_too(refused, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MY_STORAGE", f"postgresql://me:{SECRET}@127.0.0.1/d")
    refused("study.storage=${oc.env:MY_STORAGE}", names="study.storage holds a password")


def test_no_server(refused) -> None:
    address = f"postgresql://me@127.0.0.1:{free_port()}/d"
    refused(f"study.storage={address}", names=f"{address} (Connection refused)")


def test_no_mlflow_server(refused) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    refused(f"tracking.uri={address}", names=f"MLflow store {address} cannot be opened")


def test_an_mlflow_server_that_asks_for_a_password(refused, monkeypatch) -> None:
    class Door(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Authorization"])
            self.send_error(401)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    asked: list[str] = []
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    with HTTPServer(("127.0.0.1", 0), Door) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        refused(f"tracking.uri={address}", names="set MLFLOW_TRACKING_USERNAME and")
        server.shutdown()
    assert base64.b64decode(asked[0].removeprefix("Basic ")).decode() == f"me:{SECRET}"


def test_a_wrong_password(refused, database, monkeypatch) -> None:
    monkeypatch.setenv("PGPASSWORD", SECRET)
    refused(f"study.storage={database}", names="password authentication failed")


def test_no_psycopg(refused, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    words = "study.storage=postgresql://me@127.0.0.1/d"
    refused(words, names="pip install 'kvsharer_exp[postgres]'")


def test_a_second_coordinator_from_another_folder(refused, database, tmp_path) -> None:
    owner = f"study s is being run by process {os.getpid()} of {socket.gethostname()}: wait"
    with open_study("s", storage=database, folder=tmp_path):
        refused(f"study.storage={database}", names=owner)


@pytest.mark.slow
def test_a_study_of_a_newer_version(refused, database, tmp_path) -> None:
    with open_study("s", storage=database, folder=tmp_path) as store:
        store.study.set_user_attr("version", VERSION + 1)
    refused(f"study.storage={database}", names="use the newer kvsharer_exp that made it")


@pytest.mark.slow
def test_a_database_of_another_optuna(refused, cluster, database, tmp_path) -> None:
    with open_study("s", storage=database, folder=tmp_path):
        pass
    name = database.rpartition("/")[2]
    cluster.query(name, "update alembic_version set version_num = 'v999'")
    refused(f"study.storage={database}", names="study s cannot be opened in")
