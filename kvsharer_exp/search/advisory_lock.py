"""Let one process at a time run a study that lies in a PostgreSQL server, from whatever machine.

`study.open_study` holds the lock for its block. It is an advisory lock of the server on a
connection of its own. The server lets it go when that connection ends, so no process that is killed
leaves it behind. The connection carries host and process as its name, which others can read.
https://www.postgresql.org/docs/current/explicit-locking.html#ADVISORY-LOCKS
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import URL, Connection, create_engine, text
from sqlalchemy.pool import NullPool

from kvsharer_exp.search.server_storage import StorageAwayError, driver_options, watch
from kvsharer_exp.values.errors import InputError

_NAME = "kvsharer: "
_NAME_CHARACTERS = 63  # PostgreSQL cuts what is longer
# If a machine vanishes, its connection ends after a minute, and no other setting ends it before.
_SETTINGS = {
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
    "idle_session_timeout": "0",  # not known before version 14
}
_OWNER = text(
    "select a.application_name, a.pid from pg_locks l join pg_stat_activity a on a.pid = l.pid "
    "where l.locktype = 'advisory' and l.granted and l.objsubid = 1 "
    "and (l.classid::bigint << 32) | l.objid::bigint = :key and a.datname = current_database()"
)
_TRIES = 20  # in which a connection of ours that is ended must let the lock go
_PAUSE = 0.1  # seconds


class NoLock:
    """For a server of another kind. There the lock file of the folder is the only one."""

    def hold(self) -> bool:
        """Nothing is to be held, and nothing was taken."""
        return False

    def release(self) -> None:
        """Nothing is held."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody is kept out."""
        yield


class AdvisoryLock:
    """The right to run the study ``name`` in the database ``url``."""

    def __init__(self, url: URL, name: str) -> None:
        self._study, self._key = name, _key_of(f"study {name}")
        self._title = f"{_NAME}process {os.getpid()} of {socket.gethostname()}"[:_NAME_CHARACTERS]
        options = driver_options(url, application_name=self._title)
        self._engine = create_engine(
            url, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args=options
        )
        watch(self._engine)
        self._connection: Connection | None = None
        self._server_process = 0

    def hold(self) -> bool:
        """Take the lock; if it is held already, see that it still is, and else take it again.

        Returns:
            Whether it was taken just now.

        Raises:
            InputError: another process has it; the message names host and process.
            StorageAwayError: the server does not answer.
        """
        if self._connection is not None:
            try:
                self._connection.execute(text("select 1"))
                return False
            except StorageAwayError:
                self.release()
        self._connection = self._engine.connect()
        try:
            self._take(self._connection)
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        """Let the lock go."""
        if self._connection is not None:
            self._connection.invalidate()  # it may be broken, and then it cannot be closed in order
            self._connection.close()
            self._connection = None

    def owner(self) -> str:
        """Process and host of whoever has the lock, on any machine; empty if nobody has it.

        Raises:
            StorageAwayError: the server does not answer.
        """
        with self._engine.connect() as connection:
            return self._owner(connection)[0].removeprefix(_NAME)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other process that holds a lock of ours makes tables in this database."""
        assert self._connection is not None, "the lock is not held"
        key = {"key": _key_of("tables")}
        self._connection.execute(text("select pg_advisory_lock(:key)"), key)
        try:
            yield
        finally:
            self._connection.execute(text("select pg_advisory_unlock(:key)"), key)

    def _take(self, connection: Connection) -> None:
        for name, value in _SETTINGS.items():
            given = {"name": name, "value": value}
            known = "select set_config(name, :value, false) from pg_settings where name = :name"
            connection.execute(text(known), given)
        key, before = {"key": self._key}, self._server_process
        for _ in range(_TRIES):
            if connection.execute(text("select pg_try_advisory_lock(:key)"), key).scalar_one():
                number = connection.execute(text("select pg_backend_pid()")).scalar_one()
                self._server_process = int(number)
                return
            owner, number = self._owner(connection)
            if (owner, number) != (self._title, before):
                break
            # The server has not noticed yet that our connection of before is gone.
            connection.execute(text("select pg_terminate_backend(:pid)"), {"pid": number})
            time.sleep(_PAUSE)
        raise InputError(
            f"study {self._study} is being run by {owner.removeprefix(_NAME) or 'another process'}:"
            " wait for it, or give this run its own study.name"
        )

    def _owner(self, connection: Connection) -> tuple[str, int]:
        """The name of the connection that holds the lock, and its process in the server."""
        found = connection.execute(_OWNER, {"key": self._key}).first()
        return (found[0], found[1]) if found else ("", 0)


def _key_of(what: str) -> int:
    """The number that PostgreSQL knows the lock by."""
    digest = hashlib.sha256(f"kvsharer_exp {what}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
