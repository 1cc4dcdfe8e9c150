"""MLflow: one run per command, one child run per trial. Nothing else touches the store.

Uses `MlflowClient` only, never the global fluent state: a child run costs one create, one batch
and one end. https://mlflow.org/docs/latest/tracking.html
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
_BATCH = 100  # MLflow's limit of params and of tags in one call
_PARAM = 6000  # and of characters in a param


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
        local = uri.startswith("sqlite:///")
        with _store_errors(uri), _quiet():
            if local:
                Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            from mlflow.tracking import MlflowClient

            client = MlflowClient(tracking_uri=uri)
            found = client.get_experiment_by_name(experiment)
            if found is not None:
                return cls(client, found.experiment_id)
            location = None
            if local:
                location = (Path(artifacts).resolve() / experiment).as_uri()
            return cls(client, client.create_experiment(experiment, artifact_location=location))

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
        self._log_params(run_id, params)
        return run_id

    def log_trial(
        self, parent_id: str, result: TrialResult, more: Mapping[str, float], *, name: str
    ) -> str:
        """A child run with the map, params, scores and footprint of one trial; returns its id."""
        shared = result.sharing_map
        tags = {
            "mlflow.parentRunId": parent_id,
            "digest": shared.digest,
            "kv_source_layers": str(shared),
            "status": result.status,
            "stage": result.stage_reached,
            "origin": result.origin,
            "front": "false",
        }
        if result.reason:
            tags["reason"] = result.reason
        run_id = self._client.create_run(self._experiment_id, run_name=name, tags=tags).info.run_id
        metrics = {
            **result.scores,
            "kv_fraction": result.footprint.kv_fraction,
            "kv_bytes_per_token": result.footprint.kv_bytes_per_token,
            "num_shared": len(shared.targets),
            "seconds": result.seconds,
            **more,
        }
        if result.score is not None:
            metrics["score"] = result.score
        params = {"map": str(shared), **{k: str(v) for k, v in result.params.items()}}
        self._log_params(run_id, params, new=True)
        self.log_metrics(run_id, metrics, step=result.number)
        self.finish(run_id, "FAILED" if result.status == "failed" else "FINISHED")
        return run_id

    def _log_params(self, run_id: str, params: Mapping[str, str], *, new: bool = False) -> None:
        from mlflow.entities import Param

        held = {} if new else self._client.get_run(run_id).data.params
        items = [
            Param(_name(key), str(value)[:_PARAM])
            for key, value in params.items()
            if _name(key) not in held
        ]
        for start in range(0, len(items), _BATCH):
            self._client.log_batch(run_id, params=items[start : start + _BATCH])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Finite values as metrics; the names of others go to the tag ``not_finite``."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        self._client.log_batch(
            run_id, metrics=[Metric(_name(k), float(v), now, step) for k, v in finite.items()]
        )
        if len(finite) < len(metrics):
            self.set_tags(run_id, {"not_finite": ", ".join(sorted(set(metrics) - set(finite)))})

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        items = [RunTag(key, str(value)) for key, value in tags.items()]
        for start in range(0, len(items), _BATCH):
            self._client.log_batch(run_id, tags=items[start : start + _BATCH])

    def log_text(self, run_id: str, text: str, path: str) -> None:
        self.log_bytes(run_id, text.encode(), path)

    def log_bytes(self, run_id: str, content: bytes, path: str) -> None:
        """Keep ``content`` as the run's artifact ``path`` (a bare file name)."""
        with tempfile.TemporaryDirectory() as folder, _quiet():
            file = Path(folder) / path
            file.write_bytes(content)
            self._client.log_artifact(run_id, str(file))

    def mark_front(self, members: Iterable[str], before: Iterable[str] = ()) -> None:
        """Tag ``front=true`` on the members, ``front=false`` on those of ``before`` that left."""
        members = set(members)
        for run_id in set(before) - members:
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
        except MlflowException:
            return False

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
    return command, {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def _name(key: str) -> str:
    """MLflow takes letters, digits, and ``_-. /:`` in names."""
    return re.sub(r"[^\w\-. /:]", "_", key)


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow's and Alembic's chatter off inside; warnings stay."""
    names = ("mlflow", "alembic", "mlflow.store.db.utils", "alembic.runtime.migration")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _store_errors(uri: str) -> Iterator[None]:
    """Whatever a store raises when it cannot be opened, as one line."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        text = " ".join(str(error).split())
        if "db upgrade" in text or "out-of-date" in text:
            way = f"run `mlflow db upgrade {uri}` once"
        else:
            way = "check that it is writable and not in use, or give another tracking.uri"
        reason = re.sub(r"\((sqlite3|Background).*?\)\s*", "", text)[:70]
        raise InputError(f"MLflow store {uri} cannot be opened ({reason}): {way}") from error
