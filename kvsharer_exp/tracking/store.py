"""Open an MLflow store: make it if it is not there, refuse it in one line if it cannot be used.

`Tracker` and `Runs` open their store here. The command ``ui`` prepares its store here too.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from kvsharer_exp.tracking.interrupts import UninterruptedClient
from kvsharer_exp.tracking.local_store import (
    database_file,
    find_artifacts,
    has_content,
    make_database,
)
from kvsharer_exp.tracking.patience import PatientClient
from kvsharer_exp.values.addresses import without_password
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import clip, shorten

_MESSAGE = 200  # the most characters of an error message


def open_store(uri: str, experiment: str, artifacts: str) -> tuple[Any, str]:
    """Open the store for `Tracker.open` and `Runs.open`; returns (client, experiment id).

    Raises:
        InputError: the store cannot be opened or written, its files are gone, or the experiment was
            deleted.
    """
    prepare_store(uri, experiment, artifacts)
    with _impatient(), _store_errors(uri), quiet(logging.CRITICAL):
        from mlflow.tracking import MlflowClient

        # MLflow raises its errors and logs them with a traceback; raising is enough.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            local = database_file(uri) is not None
            location = (Path(artifacts).resolve() / experiment).as_uri() if local else None
            found = _make_experiment(client, experiment, location)
        if found.lifecycle_stage != "active":
            raise InputError(
                f"MLflow experiment {experiment} is deleted: run `mlflow experiments restore "
                f"-x {found.experiment_id}`, or give another tracking.experiment"
            )
    # A server finishes its transactions by itself, and may be away for a while.
    kind = PatientClient if uri.startswith("http") else UninterruptedClient
    return kind(client), found.experiment_id


def require_store(uri: str) -> None:
    """Refuse a local store that does not exist yet, where only its runs are wanted.

    Raises:
        InputError: there is no such file.
    """
    file = database_file(uri)
    if file is not None and not file.exists():
        raise InputError(
            f"MLflow store {shorten(uri, 80)} does not exist, so it has no runs: "
            "run a command first, or check tracking.uri"
        )


def _make_experiment(client: Any, name: str, place: str | None) -> Any:
    """Make an experiment, unless another process has just made it; returns it."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_experiment(name, artifact_location=place)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.get_experiment_by_name(name)


def prepare_store(uri: str, experiment: str, artifacts: str) -> None:
    """Make a local database if it is not there, check it, and see to it that its files are found.

    This comes before MLflow opens the store. MLflow tries ten times in 100 s to open what is no
    file, and does not notice when it reads from a file that it cannot write.

    Raises:
        InputError: the folder or file is read-only, locked, or no database, or its files are gone.
    """
    # No usage data goes to MLflow's makers unless the user allows it; MLflow reads this at import.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    file, folder = database_file(uri), Path(artifacts).resolve()
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for path in (file.parent, file):
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(f"{path.name} is read-only")
        if not has_content(file):
            with _store_errors(uri), quiet(logging.CRITICAL):
                make_database(file, folder)
        with closing(sqlite3.connect(file)) as database:  # waits 5 s for a lock
            database.execute("begin immediate")
        find_artifacts(file, folder, experiment)
    except (sqlite3.Error, OSError) as error:
        raise _refusal(uri, str(error)) from error


@contextmanager
def _impatient() -> Iterator[None]:
    """Inside, a server that does not answer fails after seconds, not after MLflow's minutes."""
    settings = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    added = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


@contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """Inside, MLflow and Alembic log nothing below ``level``."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, old in zip(loggers, before, strict=True):
            logger.setLevel(old)


@contextmanager
def _store_errors(uri: str) -> Iterator[None]:
    """Turn whatever a store raises when it cannot be opened into one line.

    A missing database driver counts too.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        raise is_outdated(uri, str(error)) or _refusal(uri, str(error)) from error


def is_outdated(uri: str, text: str) -> InputError | None:
    """The error, with its way out, if ``text`` has MLflow's words for a store of another schema.

    The result is None if it has not.
    """
    if "out-of-date database schema" not in " ".join(text.split()):
        return None
    # A command that is cut short would not run.
    short = len(uri) < 90 and uri == without_password(uri)
    upgrade = f"`mlflow db upgrade {uri if short else '<tracking.uri>'}`"
    return InputError(
        f"MLflow store was made by another MLflow: run {upgrade} once, or use the newer MLflow "
        "that made it"
    )


def _refusal(uri: str, text: str) -> InputError:
    way = "make it reachable and writable, or give another tracking.uri"
    if re.search(r"error code 40[13]\b", text):
        way = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if "unsupported URI" in text:
        text, way = (
            "no kind of store has such an address",
            "give sqlite:///FILE or http://HOST:PORT",
        )
    reason = re.sub(r"\(sqlite3\.\w+\)\s*|\s*[\[(](SQL:|Background).*", "", " ".join(text.split()))
    start = f"MLflow store {clip(without_password(uri), 60)} cannot be opened ("
    reason = clip(reason, _MESSAGE - len(start) - len(way) - 3)
    return InputError(f"{start}{reason}): {way}")
