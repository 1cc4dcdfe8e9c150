"""Files that several processes may prepare at once: checksums, locks, whole files or none.

`assets`, `gguf` and `load` use these functions, so that no process sees half a file or folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import shorten

_log = logging.getLogger(__name__)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex characters."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256(path: Path, record: Path) -> str:
    """Return the SHA-256 of a file and remember it in ``record``.

    The file is read again only when its size or its modification time has changed.
    """
    stat = path.stat()
    stamp = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        if {key: known[key] for key in stamp} == stamp:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.debug("%s is hashed: no usable record (%s)", path, error)
    digest = sha256(path)
    try:
        write_atomically(record, json.dumps({**stamp, "sha256": digest}))
    except OSError as error:  # a read-only cache is fine, only slower
        _log.debug("%s is not remembered (%s)", path, error)
    return digest


def make_folder(path: Path, key: str) -> None:
    """Make a folder that the user named by ``key``, if it is not there.

    Raises:
        InputError: it cannot be made, or not be written in.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "it is read-only")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG):
            raise
        raise InputError(
            f"{key}={shorten(path)} cannot be written ({error.strerror}): give another folder"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text so that ``path`` is either the old file or the whole new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``path`` as a lock between processes; a process that is killed releases it."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("waiting for another process that prepares %s", path.stem)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Make a temporary folder beside ``path``, to prepare ``path`` in.

    Such folders that killed processes left behind are removed first. Use it under the lock of
    ``path``.
    """
    prefix = f".{path.name}.partial-"
    for left in path.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        dir=path.parent, prefix=prefix, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)
