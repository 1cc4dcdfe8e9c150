"""Open the Optuna study of a sweep, for one process at a time.

`coordinator.run_search` searches in it, and `study_store` knows what it keeps beside the trials.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.storages import JournalStorage

from kvsharer_exp.model.files import locked
from kvsharer_exp.search.journal import open_journal
from kvsharer_exp.search.study_store import StudyStore
from kvsharer_exp.values.errors import InputError


@contextmanager
def open_study(
    name: str, *, storage: str | None, folder: Path, fresh: bool = False
) -> Iterator[StudyStore]:
    """Open the study ``name``, and create it if it is new; no other process has it in the block.

    Args:
        storage: an RDB URL (``postgresql://…``) or a journal file; None: a journal in ``folder``.
        folder: holds the lock of the study; it is made if it is not there.
        fresh: forget what the study holds.

    Raises:
        InputError: another process runs the study, or the storage cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / f"{name}.lock", name) as key:
        where = storage or str(folder / f"{name}.journal")
        try:
            if "://" in where:
                # A database in which two processes make Optuna's tables at once fails for one.
                with locked(folder / "study.storage.open"):
                    study = _load(name, where, fresh)
            else:
                study = _load(name, open_journal(Path(where)), fresh)
        except Exception as error:  # every backend raises its own kinds
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise InputError(
                f"study {name} cannot be opened in {where} ({first[:80]}): "
                "check study.storage, or move that file away"
            ) from error
        yield StudyStore(study, key)


def _load(name: str, storage: str | JournalStorage, fresh: bool) -> optuna.Study:
    if fresh and name in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name=name, storage=storage)
    return optuna.create_study(
        study_name=name,
        storage=storage,
        directions=["minimize", "maximize"],
        load_if_exists=True,
    )


@contextmanager
def _lock(path: Path, name: str) -> Iterator[str]:
    """Be the only process that runs the study ``name``; gives the key that is kept in the lock.

    The lock is a file with the key in its first line, and host and process in the second.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = (file.read().splitlines() or [""])[1:] or ["another process"]
            raise InputError(
                f"study {name} is being run by {owner[0]}: wait for it, "
                "or give this run its own study.name"
            ) from error
        file.seek(0)
        key = file.readline().strip()
        if re.fullmatch("[0-9a-f]{32}", key) is None:  # it is new, or its maker was killed
            key = uuid.uuid4().hex
        file.truncate(0)
        file.write(f"{key}\nprocess {os.getpid()} of {socket.gethostname()}\n")
        file.flush()
        yield key
