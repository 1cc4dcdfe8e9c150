"""Look after a store that is a local SQLite file: make it whole or not at all, and let it be moved.

`store.prepare_store` calls `make_database` and `find_artifacts` before MLflow opens the store.

MLflow makes a database in some fifty steps, which take seconds. A second process that opens it
meanwhile fails, and a process that is killed leaves a database that none can open. So it is made
beside its place by one process at a time, and moved there when it is complete.

MLflow keeps where files lie as absolute paths: for each experiment, each run and each logged model.
In a folder that was moved, renamed or copied, they are changed to where the files lie now.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kvsharer_exp.model.files import locked
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import shorten

LOCAL = "sqlite:///"
"""How the address of a local store begins; the path of its file follows."""

# Where MLflow keeps places of files. An experiment's is the folder of all its other places.
_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def database_file(uri: str) -> Path | None:
    """The file of a local store; None for a server."""
    return Path(uri.partition("?")[0].removeprefix(LOCAL)) if uri.startswith(LOCAL) else None


def has_content(file: Path) -> bool:
    """Whether the file is there and not empty."""
    return file.exists() and file.stat().st_size > 0


def make_database(file: Path, artifacts: Path) -> None:
    """Make the database ``file`` if it is not there; its folder has to be there.

    ``artifacts``: the folder that experiments keep their files in.
    """
    file = file.resolve()
    lock = file.with_name(f"{file.name}.lock")
    with locked(lock):
        if not has_content(file):  # no other process has made it meanwhile
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            new = file.with_name(f"{file.name}.new")
            for left in (new, new.with_name(f"{new.name}-journal")):
                left.unlink(missing_ok=True)
            SqlAlchemyStore(f"{LOCAL}{new}", str(artifacts)).engine.dispose()
            os.replace(new, file)
        lock.unlink(missing_ok=True)  # once there is the file, nobody needs the lock


def find_artifacts(file: Path, artifacts: Path, experiment: str) -> None:
    """Make the store name the places where its files lie now, if its folder was moved or copied.

    The files of each experiment are looked for in its folder in ``artifacts``. They are this
    store's if one of its runs is among them. If they are not there, the place that the store names
    stays, because it may be elsewhere on purpose. So does the place of a run whose files are there.

    Raises:
        InputError: the files of ``experiment`` are in neither place.
    """
    with closing(sqlite3.connect(file)) as database, database:
        tables = {name for (name,) in database.execute("select name from sqlite_master")}
        if not {table for table, _ in _PLACES} <= tables:
            return  # the store of another MLflow, and MLflow will say so
        database.create_function("is_there", 1, _is_there)
        for number, name, before in list(_experiments(database)):
            old, new = _path_of(before), artifacts / name
            if old is None or _are_same(old, new):
                continue
            runs = database.execute("select run_uuid from runs where experiment_id = ?", [number])
            known = {run_id for (run_id,) in runs}
            inside = {path.name for path in new.iterdir()} if new.is_dir() else set()
            if not known & inside:
                if os.path.isdir(old) or name != experiment:
                    continue
                if known and not new.is_dir():
                    raise InputError(
                        f"MLflow store {shorten(file, 28)} keeps its files in {shorten(old, 32)}, "
                        f"which is gone: put them in {shorten(new, 32)}, or make that folder to go "
                        "on without them"
                    )
            after = new.as_uri() if before.startswith("file:") else str(new)
            for table, column in _PLACES:
                moved = f"?1 || substr({column}, ?2)"
                database.execute(
                    f"update {table} set {column} = {moved} "
                    f"where ({column} = ?3 or substr({column}, 1, ?2) = ?3 || '/') "
                    f"and (is_there({moved}) or not is_there({column}))",
                    [after, len(before) + 1, before],
                )


def _experiments(database: sqlite3.Connection) -> Iterator[tuple[int, str, str]]:
    """The number, name and place of every experiment that has a place."""
    query = "select experiment_id, name, artifact_location from experiments"
    for number, name, place in database.execute(query):
        if place:
            yield number, name, place.rstrip("/")


def _are_same(one: Path, other: Path) -> bool:
    there = os.path.exists(one) and os.path.exists(other)
    return one == other or (there and os.path.samefile(one, other))


def _is_there(place: str) -> bool:
    path = _path_of(place)
    return path is not None and os.path.exists(path)


def _path_of(place: str) -> Path | None:
    """The folder that MLflow calls ``place``; None if it is not on this machine."""
    parts = urlsplit(place)
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
        return None
    return Path(unquote(parts.path) if parts.scheme else place)
