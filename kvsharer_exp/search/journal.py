"""Open the journal file of a study, whatever a killed process has left in it and beside it.

`study.open_study` opens its file here. A process can be killed at any moment, also while it writes.
Optuna's own locks are files, which a killed process leaves behind, and for a relative path the next
process waits for ever (https://github.com/optuna/optuna/issues/5921). `JournalLock` is a lock of
the operating system on the journal itself, which ends with the process that holds it. The last
record may be half written too. Optuna would append the next record to it, and could read neither.
"""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path
from typing import IO

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from kvsharer_exp.values.text_files import read_json, whole_lines

_log = logging.getLogger(__name__)

_RECORD = b'{"op_code":'  # every record of Optuna's begins so


class JournalLock(JournalFileOpenLock):
    """The right to write to a journal, which several studies may share.

    It is held for the milliseconds of one record. No file is made for it, so none is left behind.
    A record that is written in part only, because the disk is full, is taken back: studies that
    share the journal would go on behind it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), grace_period=None)
        self._path = path
        self._held: IO[bytes] | None = None
        self._size = 0  # of the journal, in bytes, when the lock was taken

    def acquire(self) -> bool:
        """Wait until no living process holds the lock, and take it."""
        file = self._path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except BaseException:
            file.close()
            raise
        self._held, self._size = file, os.fstat(file.fileno()).st_size
        return True

    def release(self) -> None:
        """Let the lock go, and take back what was written under it if it does not end a line."""
        assert self._held is not None, "the lock is not held"
        with self._held as file:
            size = os.fstat(file.fileno()).st_size
            if size > self._size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                os.ftruncate(file.fileno(), self._size)
        self._held = None


def open_journal(path: Path) -> JournalStorage:
    """Open the journal ``path``; it and its folder are made if they are not there.

    If its last record is half written, that record is cut off, and a warning says so.

    Raises:
        OSError: the file cannot be read, written or locked.
        ValueError: it is no journal.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalLock(path)
    lock.acquire()
    try:
        _cut_half_record(path)
    finally:
        lock.release()
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _is_record(line: bytes) -> bool:
    """Whether a whole line is JSON that begins as records do."""
    if not line.startswith(_RECORD):
        return False
    try:
        read_json(line.decode())
    except ValueError:
        return False
    return True


def _cut_half_record(path: Path) -> None:
    """Cut off a last line that does not end, which is the beginning of a record.

    After a loss of power it may be zeros from some byte on.

    Raises:
        ValueError: the line is something else, or the one before it is, so the file is no journal.
    """
    content = path.read_bytes()
    whole, half = whole_lines(content)
    # Optuna takes a whole last line that is no record for one that is being written.
    if whole and not _is_record(whole[whole.rfind(b"\n", 0, -1) + 1 :]):
        raise ValueError("its last line is no record")
    if whole == content:
        return
    if not (half.startswith(_RECORD) or _RECORD.startswith(half)):
        raise ValueError("its last line is no record")
    os.truncate(path, len(whole))
    _log.warning(
        "the last record of %s was half written when a run was killed: "
        "it is cut off, and what it held is done again",
        path,
    )
