"""Read runs back from an MLflow store: which runs there are, and the files they left.

The commands ``report`` and ``reproduce`` read the runs of other commands here, and `run_plans`
reads their plans.
"""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsharer_exp.tracking.local_store import database_file
from kvsharer_exp.tracking.server import UI, runs_page
from kvsharer_exp.tracking.store import open_store, quiet, require_store

_PAGE = 1000


@dataclass(frozen=True, slots=True)
class StoredRun:
    """One run of a command, or one of its child runs, which have a ``parent_id``.

    ``digest`` is that of the run's map, and ``plan`` the text of its map or plan.
    """

    run_id: str
    name: str
    status: str
    command: str
    model: str
    model_id: str
    experiment: str
    digest: str
    plan: str
    parent_id: str
    url: str


class Runs:
    """Reads runs from a store.

    A run is found by its id in any experiment; `recent` and `closest` look in one experiment only.
    """

    def __init__(self, client: Any, experiment_id: str) -> None:
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        self._client = client
        self._experiment_id = experiment_id
        uri = client.tracking_uri
        self._host = uri.rstrip("/") if uri.startswith("http") else UI

    @classmethod
    def open(cls, uri: str, experiment: str, artifacts: str) -> Runs:
        """Open the experiment in the store at ``uri``, as `Tracker.open` does.

        Raises:
            InputError: the store cannot be opened.
        """
        return cls(*open_store(uri, experiment, artifacts))

    @classmethod
    def of_store(cls, uri: str) -> Runs:
        """Open the store at ``uri`` for its runs; a local one keeps its files in the same folder.

        Raises:
            InputError: there is no such store, or it cannot be opened.
        """
        require_store(uri)
        file = database_file(uri) or Path("mlruns")
        return cls.open(uri, "kvsharer_exp", str(file.parent / "artifacts"))

    def find(self, run_id: str) -> StoredRun | None:
        """The run with this id; None if there is none, or if it was deleted."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return self._stored(run) if run.info.lifecycle_stage == "active" else None

    def recent(self) -> list[StoredRun]:
        """The runs of commands, newest first; child runs are left out."""
        found = self._client.search_runs(
            [self._experiment_id],
            filter_string="tags.command != ''",
            order_by=["attributes.start_time DESC"],
            max_results=_PAGE,
        )
        return [self._stored(run) for run in found]

    def closest(self, run_id: str) -> str:
        """The id of a command's run that begins with ``run_id``, or else is most like it.

        It is empty if no id is like it.
        """
        known = [run.run_id for run in self.recent()]
        begin = [one for one in known if run_id and one.startswith(run_id.lower())]
        near = begin or difflib.get_close_matches(run_id, known, n=1, cutoff=0.7)
        return near[0] if near else ""

    def text(self, run_id: str, path: str) -> str | None:
        """The artifact ``path`` of a run, read as UTF-8; None if the run has no such artifact."""
        content = self._read(run_id, path) if path in self._files(run_id) else None
        return None if content is None else content.decode()

    def pictures(self, run_id: str) -> dict[str, bytes]:
        """The PNG pictures that the run left, by file name."""
        names = [name for name in self._files(run_id) if name.endswith(".png")]
        return {name: self._read(run_id, name) for name in sorted(names)}

    def copy(
        self, run_id: str, paths: Collection[str], folder: Path, *, under: str | None = None
    ) -> set[str]:
        """Copy those artifacts of ``paths`` that the run has into ``folder``; returns these.

        ``under``: the folder among the artifacts that they are in.
        """
        found = set(paths) & set(self._files(run_id, under))
        for path in sorted(found):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(self._read(run_id, path))
        return found

    def _files(self, run_id: str, under: str | None = None) -> list[str]:
        listed = self._client.list_artifacts(run_id, under)
        return [file.path for file in listed if not file.is_dir]

    def _read(self, run_id: str, path: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder, quiet():
            return Path(self._client.download_artifacts(run_id, path, folder)).read_bytes()

    def _stored(self, run: Any) -> StoredRun:
        tags = run.data.tags
        return StoredRun(
            run_id=run.info.run_id,
            name=run.info.run_name or "",
            status=run.info.status,
            command=tags.get("command", ""),
            model=tags.get("model", ""),
            model_id=tags.get("model_id", ""),
            experiment=tags.get("experiment", ""),
            digest=tags.get("digest", ""),
            plan=tags.get("plan") or tags.get("kv_source_layers") or "",
            parent_id=tags.get("mlflow.parentRunId", ""),
            url=runs_page(self._host, run.info.experiment_id, run.info.run_id),
        )
