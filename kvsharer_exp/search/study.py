"""Open the Optuna study of a sweep, for one process at a time.

`coordinator.run_search` searches in it, and `study_store` knows what it keeps beside the trials. A
study is in a file here, or in a database server (`served_study`).
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TypeGuard

import optuna
from optuna.storages import BaseStorage

from kvsharer_exp.model.files import locked
from kvsharer_exp.search.journal import open_journal
from kvsharer_exp.search.study_store import StudyStore, keep_key, key_of
from kvsharer_exp.values.addresses import without_password
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import clip, shorten

_GLANCE = 0.2  # seconds; `study_status` takes the lock for less to see whether anybody has it


def check_storage(storage: str | None) -> None:
    """Refuse an address that no driver here can read; nothing is connected to.

    Raises:
        InputError: it names an unknown kind of database, or one whose driver is not installed.
    """
    if _is_served(storage):
        # SQLAlchemy takes a while to import, and a file does not need it.
        from kvsharer_exp.search.server_storage import read_address

        read_address(storage)


def _is_served(storage: str | None) -> TypeGuard[str]:
    return storage is not None and "://" in storage and not storage.startswith("sqlite")


@contextmanager
def open_study(
    name: str, *, storage: str | None, folder: Path, fresh: bool = False
) -> Iterator[StudyStore]:
    """Open the study ``name``, and create it if it is new; no other process has it in the block.

    A server that is away when the block ends is waited for, and what it has not got stays in
    ``folder``.

    Args:
        storage: an RDB URL (``postgresql://…``) or a journal file; None: a journal in ``folder``.
        folder: holds the lock of the study; it is made if it is not there.
        fresh: forget what the study holds.

    Raises:
        InputError: another process runs the study, or the storage cannot be opened.
        UnansweredError: the server of the storage was away when the block ended, and stayed away.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        key = stack.enter_context(_lock(folder / f"{name}.lock", name))
        if _is_served(storage):
            yield stack.enter_context(_in_server(name, storage, folder, fresh, key))
            return
        where = storage or str(folder / f"{name}.journal")
        try:
            if storage is not None:  # others may open it with a lock in another folder
                beside = Path(f"{storage.removeprefix('sqlite:///')}.{name}.lock")
                if "://" not in storage:
                    beside.parent.mkdir(parents=True, exist_ok=True)
                key = stack.enter_context(_lock(beside, name))
            if "://" in where:
                # A database in which two processes make Optuna's tables at once fails for one.
                with locked(folder / "study.storage.open"):
                    study = _load(name, where, fresh)
            else:
                study = _load(name, open_journal(Path(where)), fresh)
        except InputError:
            raise
        except Exception as error:  # every backend raises its own kinds
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise InputError(
                f"study {name} cannot be opened in {where} ({first[:80]}): "
                "check study.storage, or move that file away"
            ) from error
        yield StudyStore(study, key)


@contextmanager
def _in_server(
    name: str, storage: str, folder: Path, fresh: bool, key: str
) -> Iterator[StudyStore]:
    """Open a study in a database server, and deliver what an earlier process has left for it.

    ``key``: the key of a study that is new. One that is not keeps its own, wherever it is opened.
    """
    from kvsharer_exp.search.advisory_lock import AdvisoryLock, NoLock
    from kvsharer_exp.search.served_study import ServedStudy
    from kvsharer_exp.search.server_storage import (
        is_postgres,
        open_storage,
        read_address,
        reason_of,
        shown,
    )
    from kvsharer_exp.search.spool import Spool

    place = without_password(storage)
    with ExitStack() as stack:
        try:
            url = read_address(storage)
            place = shown(url)
            lock = AdvisoryLock(url, name) if is_postgres(url) else NoLock()
            stack.callback(lock.release)
            lock.hold()
            with lock.alone():
                database = open_storage(url)
                stack.callback(database.engine.dispose)
                if fresh and name in optuna.get_all_study_names(database):
                    key = key_of(optuna.load_study(study_name=name, storage=database)) or key
                # One that is too new is refused before anything is written to it.
                StudyStore(_load(name, database, fresh))
            path = folder / f"{name}.spool"
            if fresh:
                path.unlink(missing_ok=True)
            spool = Spool(path, f"{place} {database.get_study_id_from_name(name)}")
            load = partial(optuna.load_study, study_name=name, storage=database)
            served = ServedStudy(load, lock, spool, clip(place))
            key = key_of(served) or keep_key(served, key)
        except InputError:
            raise
        except Exception as error:  # every driver raises its own kinds
            reason = reason_of(error)
            way = "start the server, or check study.storage"
            if "password" in reason:
                way = "set PGPASSWORD, or put it into ~/.pgpass"
            raise InputError(
                f"study {shorten(name, 30)} cannot be opened in {clip(place, 50)} "
                f"({clip(reason, 60)}): {way}"
            ) from error
        with served.delivered_in_the_end():
            yield StudyStore(served, key)


def _load(name: str, storage: str | BaseStorage, fresh: bool) -> optuna.Study:
    if fresh and name in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name=name, storage=storage)
    return optuna.create_study(
        study_name=name,
        storage=storage,
        directions=["minimize", "maximize"],
        load_if_exists=True,
    )


def owner_in(lock: IO[str]) -> str:
    """The process and host that the lock file of a study names."""
    lock.seek(0)
    return (lock.read().splitlines()[1:] or ["another process"])[0]


@contextmanager
def _lock(path: Path, name: str) -> Iterator[str]:
    """Be the only process that runs the study ``name``; gives the key that is kept in the lock.

    The lock is a file with the key in its first line, and host and process in the second.
    """
    with path.open("a+", encoding="utf-8", errors="replace") as file:
        until = time.monotonic() + _GLANCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise InputError(
                        f"study {name} is being run by {owner_in(file)}: wait for it, "
                        "or give this run its own study.name"
                    ) from error
                time.sleep(_GLANCE / 10)
        file.seek(0)
        key = file.readline().strip()
        if re.fullmatch("[0-9a-f]{32}", key) is None:  # it is new, or its maker was killed
            key = uuid.uuid4().hex
        file.truncate(0)
        file.write(f"{key}\nprocess {os.getpid()} of {socket.gethostname()}\n")
        file.flush()
        yield key
