"""Open a study in a database server, and tell a server that is away from every other error.

`study.open_study` comes here for every ``study.storage`` that is neither a file nor SQLite. A
password belongs into ``PGPASSWORD`` or ``~/.pgpass``, which the driver reads by itself. One inside
the address works for callers in Python, and is never shown.
"""

from __future__ import annotations

import re
from typing import Any

import optuna
from optuna.storages import RDBStorage
from sqlalchemy import URL, Engine, event, make_url
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import ArgumentError

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import clip

_SCHEMES = ("postgresql", "postgres")
_DRIVER = "postgresql+psycopg"
# A host that vanishes sends nothing. After these times (seconds, and milliseconds) it is given up.
_LIBPQ = {
    "connect_timeout": 10,
    "keepalives_idle": 20,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 20_000,
}
_READ_ONLY = "25006"  # what a server says that is a copy of another one, as after a switch


class StorageAwayError(Exception):
    """The server did not answer, or it ended the connection; the message is the driver's."""


def is_postgres(url: URL) -> bool:
    return url.get_backend_name() == "postgresql"


def read_address(storage: str) -> URL:
    """The address with psycopg (version 3) as the driver, where PostgreSQL is given without one.

    Raises:
        InputError: it is no address of a database that SQLAlchemy knows, or its driver is not
            installed.
    """
    scheme, _, rest = storage.partition("://")
    start = f"study.storage={clip(scheme, 20)}://…"
    try:
        url = make_url(f"{_DRIVER}://{rest}" if scheme in _SCHEMES else storage)
        url.get_dialect().import_dbapi()
    except ArgumentError as error:
        raise InputError(
            f"{start} is no database that can be opened here: give "
            "postgresql://USER@HOST/DATABASE, or a journal file"
        ) from error
    except ImportError as error:  # also where it is there, and its library is not
        is_ours = url.drivername == _DRIVER
        way = "run pip install 'kvsharer_exp[postgres]'" if is_ours else "install it"
        raise InputError(
            f"{start} needs the driver {url.get_driver_name()}: {way}, or leave study.storage out"
        ) from error
    return url


def shown(url: URL) -> str:
    """The address for people to read, without any password."""
    plain = url.difference_update_query(["password", "sslpassword"])
    return plain.set(drivername=url.get_backend_name()).render_as_string(hide_password=True)


def driver_options(url: URL, **more: Any) -> dict[str, Any]:
    """What the driver is told beside the address; what the address says itself is left to it."""
    if url.get_driver_name() not in ("psycopg", "psycopg2"):
        return {}
    return {key: value for key, value in (_LIBPQ | more).items() if key not in url.query}


def open_storage(url: URL) -> RDBStorage:
    """Open Optuna's storage in a server; its tables are made if they are not there.

    Raises:
        StorageAwayError: the server does not answer. Later calls raise it too.
    """
    options = {"connect_args": driver_options(url), "pool_pre_ping": True}
    text = url.render_as_string(hide_password=False)
    # The tables are made in the constructor, so the engine is watched from the moment it is made.
    return _Storage(text, engine_kwargs=options)


class _Storage(RDBStorage):
    """Optuna's storage, which asks a server that is away once only, and says so.

    Optuna writes a trial up to five times. If the server took the first one and its answer was
    lost, the trial would be there twice.
    """

    engine: Engine

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "engine":
            watch(value)


def watch(engine: Engine) -> None:
    """Have the engine raise `StorageAwayError` when its server is away."""

    @event.listens_for(engine, "handle_error")
    def raise_away(context: ExceptionContext) -> None:
        if context.is_pre_ping:  # the pool makes a new connection, and that one may fail
            return
        error, dialect = context.original_exception, engine.dialect.loaded_dbapi
        kinds = (dialect.OperationalError, dialect.InterfaceError)
        read_only = getattr(error, "sqlstate", None) == _READ_ONLY
        if context.is_disconnect or isinstance(error, kinds) or read_only:
            raise StorageAwayError(reason_of(error)) from error


def reason_of(error: BaseException) -> str:
    """The telling part of what a driver says, in one line."""
    while isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__:
        error = error.__cause__
    text = " ".join(str(error).split()) or repr(error)
    # A driver lists every address of the host that it tried; one of them says enough.
    found = re.search(r"connection to server .*? failed: (.*?)(?: Is the server running.*)?$", text)
    return (found[1] if found else text).removeprefix("FATAL: ").strip()
