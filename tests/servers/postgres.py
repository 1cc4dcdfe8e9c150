"""A PostgreSQL server of the tests' own: made in a temporary folder, on this machine only."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvsharer_exp.values.ports import free_port

PACKAGE = "postgresql"
USER, PASSWORD = "searcher", "Zw7-open-sesame"
_PROGRAMS = ("initdb", "pg_ctl", "postgres", "pg_dumpall")
_SETTINGS = {
    "listen_addresses": "'127.0.0.1'",
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "60",
    "shared_buffers": "16MB",
    "logging_collector": "off",
}


def find_programs() -> Path:
    """The folder of PostgreSQL's server programs, which are installed if they are missing.

    A test never goes without them: it fails, and names the package.
    """
    found = _installed()
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", PACKAGE]):
            subprocess.run(["apt-get", "-qq", *words], env=quiet, check=False)
        found = _installed()
    if found is None:
        pytest.fail(f"no PostgreSQL server here: install the package {PACKAGE}", pytrace=False)
    return found


def _installed() -> Path | None:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    folders += [Path(folder) for folder in os.get_exec_path()]
    complete = (f for f in folders if all((f / name).is_file() for name in _PROGRAMS))
    return next(complete, None)


@dataclass
class Cluster:
    """A server that can be stopped and started again; its data stay."""

    programs: Path
    folder: Path
    port: int

    def start(self) -> None:
        log = self.folder / "log"
        self._run("pg_ctl", "-D", self._data, "-w", "-l", str(log), "start")

    def stop(self, mode: str = "immediate") -> None:
        self._run("pg_ctl", "-D", self._data, "-w", "-m", mode, "stop")

    @contextmanager
    def away(self) -> Iterator[None]:
        """Stop the server for the block, as a crash does."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def address(self, database: str, user: str = USER) -> str:
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def make_database(self, name: str) -> str:
        """Make a database of this name afresh; returns its address."""
        self.query("postgres", f'drop database if exists "{name}" with (force)')
        self.query("postgres", f'create database "{name}"')
        return self.address(name)

    def query(self, database: str, command: str) -> list[tuple]:
        import psycopg

        target = self.address(database)
        with psycopg.connect(target, password=PASSWORD, autocommit=True) as connection:
            done = connection.execute(command)
            return done.fetchall() if done.description else []

    @property
    def _data(self) -> str:
        return str(self.folder / "data")

    def make(self) -> None:
        """Make the cluster's files; its only user needs a password."""
        secret = self.folder / "secret"
        secret.write_text(PASSWORD)
        if os.geteuid() == 0:  # the server refuses to run as root
            _, user, group = _server_user()
            for path in (self.folder, secret):
                os.chown(path, user, group)
        known = ["--auth=scram-sha-256", f"--username={USER}", f"--pwfile={secret}"]
        self._run("initdb", "-D", self._data, *known, "--no-sync", "-E", "UTF8", "--locale=C")
        settings = {
            **_SETTINGS,
            "port": str(self.port),
            "unix_socket_directories": f"'{self.folder}'",
        }
        with (self.folder / "data" / "postgresql.conf").open("a") as file:
            file.write("".join(f"{name} = {value}\n" for name, value in settings.items()))

    def _run(self, program: str, *words: str) -> None:
        command: Sequence[str] = [str(self.programs / program), *words]
        if os.geteuid() == 0:
            command = ["runuser", "-u", _server_user()[0], "--", *command]
        output = self.folder / "output"
        with output.open("wb") as file:  # a pipe would stay open as long as the server runs
            done = subprocess.run(
                command, cwd=self.folder, stdout=file, stderr=subprocess.STDOUT, check=False
            )
        assert done.returncode == 0, f"{program}: {output.read_text()}"


def _server_user() -> tuple[str, int, int]:
    """The unprivileged user that Debian's package has made, or nobody."""
    names = {entry.pw_name for entry in pwd.getpwall()}
    entry = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return entry.pw_name, entry.pw_uid, entry.pw_gid


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A running server, which is stopped and deleted in the end."""
    # A socket's path may have 107 characters, so pytest's own folders are too deep for it. The
    # server's user must also be able to enter every folder above.
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        inner = Path(folder) / "cluster"
        inner.mkdir()
        cluster = Cluster(find_programs(), inner, free_port())
        cluster.make()
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()
