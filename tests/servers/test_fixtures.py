"""The tests of this folder are never skipped: without a server, they say what to install."""

import os
import subprocess

import psycopg
import pytest

from tests.servers import postgres
from tests.servers.postgres import Cluster, find_programs


def test_without_postgresql_the_package_is_named(monkeypatch) -> None:
    monkeypatch.setattr(postgres, "_installed", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(pytest.fail.Exception, match="install the package postgresql"):
        find_programs()


def test_as_root_the_package_is_installed(monkeypatch, tmp_path) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(postgres, "_installed", lambda: tmp_path if len(ran) == 2 else None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(postgres.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(command))
    assert find_programs() == tmp_path
    assert ran[1][-1] == "postgresql"
    assert ran[1][:3] == ["apt-get", "-qq", "install"]


def test_the_server_listens_on_this_machine_only(cluster: Cluster, monkeypatch) -> None:
    assert cluster.query("postgres", "show listen_addresses") == [("127.0.0.1",)]
    assert cluster.query("postgres", "show password_encryption") == [("scram-sha-256",)]
    monkeypatch.setenv("PGPASSWORD", "wrong")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(cluster.address("postgres"))
