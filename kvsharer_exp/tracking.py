"""MLflow: one run per command, one child run per trial. Nothing else touches the store.

Uses `MlflowClient` only, never the global fluent state: a child run costs one create, one batch
and one end. https://mlflow.org/docs/latest/tracking.html
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import platform
import posixpath
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from kvsharer_exp.errors import InputError
from kvsharer_exp.records import TrialResult
from kvsharer_exp.sharing_map import SharingMap

UI = "http://127.0.0.1:5000"
_PACKAGES = (
    *("torch", "transformers", "optuna", "lm_eval", "mlflow", "hydra-core", "datasets"),
    "kvsharer_exp",
)
# MLflow's limits: params, tags and metrics in one call (1000 of all kinds), characters.
_PARAMS, _METRICS = 100, 800
_NAME, _PARAM, _TAG = 250, 6000, 8000
_MESSAGE = 200  # characters of our own errors


class Tracker:
    """Writes runs of one experiment."""

    def __init__(self, client: Any, experiment_id: str) -> None:
        self._client = client
        self._experiment_id = experiment_id

    @classmethod
    def open(
        cls,
        uri: str = "sqlite:///mlruns/mlflow.db",
        experiment: str = "kvsharer_exp",
        artifacts: str = "mlruns/artifacts",
    ) -> Tracker:
        """The experiment in the store at ``uri``, both made when they are not there.

        ``artifacts``: folder of a local store; a server keeps its own.

        Raises:
            InputError: the store cannot be opened or written.
        """
        path = uri.partition("?")[0].removeprefix("sqlite:///")
        local = uri.startswith("sqlite:///")
        # No usage data to a third party unless the user says so; read when mlflow is imported.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        with _impatient(), _store_errors(uri), _quiet(logging.CRITICAL):
            if local:
                _make_writable(Path(path))
            from mlflow.tracking import MlflowClient

            client = MlflowClient(tracking_uri=uri)
            found = client.get_experiment_by_name(experiment)
            if found is None:
                location = (Path(artifacts).resolve() / experiment).as_uri() if local else None
                made = client.create_experiment(experiment, artifact_location=location)
                return cls(client, made)
            if found.lifecycle_stage != "active":
                raise InputError(
                    f"MLflow experiment {experiment} is deleted: run `mlflow experiments restore "
                    f"-x {found.experiment_id}`, or give another tracking.experiment"
                )
            return cls(client, found.experiment_id)

    def start_run(
        self,
        name: str,
        *,
        tags: Mapping[str, str],
        params: Mapping[str, str],
        run_id: str | None = None,
    ) -> str:
        """A new run, or ``run_id`` continued: then params it has keep their first value."""
        if run_id is None:
            run = self._client.create_run(self._experiment_id, run_name=name, tags=dict(tags))
            run_id = run.info.run_id
        else:
            self._client.update_run(run_id, status="RUNNING")
            self.set_tags(run_id, tags)
        held = self._client.get_run(run_id).data.params
        self._log(run_id, params=[param for param in _params(params) if param.key not in held])
        return run_id

    def log_trial(
        self, parent_id: str, result: TrialResult, more: Mapping[str, float], *, name: str = ""
    ) -> str:
        """A child run with the map, params, scores and footprint of one trial; returns its id.

        A run is FAILED when its trial is; one that was screened out did what it was asked.
        """
        shared = result.sharing_map
        metrics = {
            **result.scores,
            "kv_fraction": result.footprint.kv_fraction,
            "kv_bytes_per_token": result.footprint.kv_bytes_per_token,
            "num_shared": len(shared.targets),
            "seconds": result.seconds,
            **({} if result.score is None else {"score": result.score}),
            **more,
        }
        tags = {
            "mlflow.parentRunId": parent_id,
            "digest": shared.digest,
            "kv_source_layers": str(shared),
            "num_shared": str(len(shared.targets)),
            "status": result.status,
            "stage": result.stage_reached,
            "origin": result.origin,
            "reason": result.reason,
            "not_finite": _not_finite(metrics),
            "front": "false",
        }
        run_id = self._client.create_run(
            self._experiment_id,
            run_name=name or f"{len(shared.targets)}/{shared.num_layers} shared",
            tags={key: value[:_TAG] for key, value in tags.items() if value},
        ).info.run_id
        params = {"map": str(shared), **result.params}
        self._log(run_id, metrics=_metrics(metrics, result.number), params=_params(params))
        self.finish(run_id, "FAILED" if result.status == "failed" else "FINISHED")
        return run_id

    def _log(
        self,
        run_id: str,
        *,
        metrics: Sequence[Any] = (),
        params: Sequence[Any] = (),
        tags: Sequence[Any] = (),
    ) -> None:
        """In as few calls as MLflow's limits allow; none for nothing."""
        while metrics or params or tags:
            self._client.log_batch(run_id, metrics[:_METRICS], params[:_PARAMS], tags[:_PARAMS])
            metrics, params, tags = metrics[_METRICS:], params[_PARAMS:], tags[_PARAMS:]

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Finite values as metrics; the names of others go to the tag ``not_finite``."""
        lost = _not_finite(metrics)
        self._log(
            run_id,
            metrics=_metrics(metrics, step),
            tags=_tags({"not_finite": lost}) if lost else [],
        )

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set the tags, over those of the same name."""
        self._log(run_id, tags=_tags(tags))

    def log_text(self, run_id: str, text: str, path: str) -> None:
        """Keep ``text`` as the run's artifact ``path``, UTF-8."""
        self.log_bytes(run_id, text.encode(), path)

    def log_dict(self, run_id: str, values: Mapping[str, Any], path: str) -> None:
        """Keep ``values`` as the run's artifact ``path``, JSON."""
        self.log_text(run_id, json.dumps(values, indent=2, allow_nan=False) + "\n", path)

    def log_bytes(self, run_id: str, content: bytes, path: str) -> None:
        """Keep ``content`` as the run's artifact ``path``; folders in it are made."""
        parent, _, name = path.rpartition("/")
        with tempfile.TemporaryDirectory() as folder, _quiet():
            file = Path(folder) / name
            file.write_bytes(content)
            self._client.log_artifact(run_id, str(file), parent or None)

    def mark_front(self, members: Iterable[str], before: Iterable[str] = ()) -> None:
        """Tag ``front=true`` on the members, ``front=false`` on those of ``before`` that left.

        A run of ``before`` that was deleted in the UI since is passed over.
        """
        members = set(members)
        for run_id in set(before) - members:
            if self.exists(run_id):
                self.set_tags(run_id, {"front": "false"})
        for run_id in members:
            self.set_tags(run_id, {"front": "true"})

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(run_id, status)

    def exists(self, run_id: str) -> bool:
        """Whether the store holds the run, not deleted."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            # A malformed id is none of the store's; any other error says nothing about the run.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return False
            raise

    def find_map(self, run_id: str) -> SharingMap:
        """The map of a run.

        Raises:
            InputError: no such run, or a run without a map.
        """
        if not self.exists(run_id):
            raise InputError(f"MLflow run {run_id} is not in this store: check tracking.uri")
        text = self._client.get_run(run_id).data.tags.get("kv_source_layers")
        if text is None:
            raise InputError(
                f"MLflow run {run_id} has no map: give a trial of a sweep or an evaluate run"
            )
        return SharingMap.parse(text)

    def run_url(self, run_id: str, host: str = UI) -> str:
        """Where the UI shows the run."""
        return f"{host}/#/experiments/{self._experiment_id}/runs/{run_id}"


def environment() -> dict[str, str]:
    """Versions, machine and commit: what a result depends on besides its configuration."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package.replace("-", "_")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package.replace("-", "_")] = "not installed"
    versions["platform"] = f"{platform.system()} {platform.machine()}"
    versions["cpus"] = str(os.cpu_count())
    versions["git_commit"] = _git_commit(Path(__file__).resolve().parent)
    return versions


def _git_commit(folder: Path) -> str:
    """The commit this code is from, ``+changes`` when edited since; ``none`` outside a checkout."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    if not commit or not git("ls-files", "--", __file__):
        return "none"
    return commit + ("+changes" if git("status", "--porcelain", "--", str(folder)) else "")


def ui_command(uri: str, port: int) -> tuple[list[str], dict[str, str]]:
    """(argv, environment) of an MLflow server on this machine only: one worker, no job runner."""
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)]
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return command, {**os.environ, **settings}


def _name(key: str) -> str:
    """MLflow takes letters, digits and ``_-. /:`` in names that are paths in normal form."""
    path = posixpath.normpath(re.sub(r"[^\w\-. /:]", "_", key)).lstrip("./")
    return path[:_NAME].rstrip("/") or "_"


def _metrics(values: Mapping[str, float], step: int) -> list[Any]:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    finite = {_name(key): float(value) for key, value in values.items() if math.isfinite(value)}
    return [Metric(name, value, now, step) for name, value in finite.items()]


def _not_finite(values: Mapping[str, float]) -> str:
    return ", ".join(sorted(key for key, value in values.items() if not math.isfinite(value)))


def _params(values: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import Param

    named = {_name(key): str(value)[:_PARAM] for key, value in values.items()}
    return [Param(name, value) for name, value in named.items()]


def _tags(values: Mapping[str, str]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(key, str(value)[:_TAG]) for key, value in values.items()]


def _make_writable(file: Path) -> None:
    """The folder of the database, made, and the file one that SQLite can write to.

    Asked first: MLflow tries ten times in 100 s to open what is no file, and reads happily from
    what it cannot write.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    for path in (file.parent, file):
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(f"{path.name} is read-only")
    if file.exists():
        with closing(sqlite3.connect(file)) as database:  # waits 5 s for a lock
            database.execute("begin immediate")


@contextmanager
def _impatient() -> Iterator[None]:
    """A server that does not answer fails in seconds inside, not after MLflow's minutes."""
    settings = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    added = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


@contextmanager
def _quiet(level: int = logging.WARNING) -> Iterator[None]:
    """MLflow's and Alembic's chatter below ``level`` is off inside."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "mlflow.store.db.utils", "alembic")]
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
    """Whatever a store raises when it cannot be opened (also: no driver for it), as one line."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ImportError) as error:
        text = " ".join(str(error).split())
        if "out-of-date database schema" in text:
            raise InputError(
                f"MLflow store was made by another MLflow: run `mlflow db upgrade {uri}` once, "
                "or use the newer MLflow that made it"
            ) from error
        way = "make it reachable and writable, or give another tracking.uri"
        reason = re.sub(r"\(sqlite3\.\w+\)\s*|\s*[\[(](SQL:|Background).*", "", text)
        start = f"MLflow store {_short(uri, 60)} cannot be opened ("
        reason = _short(reason, _MESSAGE - len(start) - len(way) - 3)
        raise InputError(f"{start}{reason}): {way}") from error


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
