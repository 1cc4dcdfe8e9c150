"""Runs of one experiment, written.

Uses `MlflowClient` only, never the global fluent state: a child run costs one create, one batch
and one end. https://mlflow.org/docs/latest/tracking.html
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvsharer_exp.tracking.server import UI, runs_page
from kvsharer_exp.tracking.store import open_store, quiet
from kvsharer_exp.tracking.system import AFTER_SECONDS, SystemMetrics
from kvsharer_exp.tracking.values import TAG, metrics_of, not_finite, params_of, tags_of
from kvsharer_exp.tracking.views import VIEW_TAG, envelope, front_view
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import TrialResult

# MLflow's limits: params, tags and metrics in one call (1000 of all kinds).
_PARAMS, _METRICS = 100, 800


class Tracker:
    """Writes runs of one experiment."""

    def __init__(
        self, client: Any, experiment_id: str, *, sample_after_seconds: float = AFTER_SECONDS
    ) -> None:
        self._client = client
        self._experiment_id = experiment_id
        self._sample_after_seconds = sample_after_seconds
        self._sampled: dict[str, SystemMetrics] = {}
        uri = client.tracking_uri
        self._host = uri.rstrip("/") if uri.startswith("http") else UI

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
        return cls(*open_store(uri, experiment, artifacts))

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
        self._log(run_id, params=[param for param in params_of(params) if param.key not in held])
        self._sampled[run_id] = SystemMetrics(
            self._client.tracking_uri, run_id, self._sample_after_seconds
        )
        return run_id

    def log_trial(
        self, parent_id: str, result: TrialResult, more: Mapping[str, float], *, name: str = ""
    ) -> str:
        """A child run with the map, scores and footprint of one trial; returns its id.

        What the sampler drew is one tag: a param per layer would bury the few that compare.
        A run is FAILED when its trial is; one that was screened out did what it was asked.
        """
        sharing_map = result.sharing_map
        metrics = {
            **result.scores,
            "kv_fraction": result.footprint.kv_fraction,
            "kv_bytes_per_token": result.footprint.kv_bytes_per_token,
            "num_shared": len(sharing_map.targets),
            "seconds": result.seconds,
            **({} if result.score is None else {"score": result.score}),
            **more,
        }
        tags = {
            "mlflow.parentRunId": parent_id,
            "digest": sharing_map.digest,
            "kv_source_layers": str(sharing_map),
            "num_shared": str(len(sharing_map.targets)),
            "trial": str(result.number),
            "drawn": json.dumps(dict(result.params), separators=(",", ":"), default=str),
            "status": result.status,
            "stage": result.stage_reached,
            "origin": result.origin,
            "reason": result.reason,
            "not_finite": not_finite(metrics),
            "front": "false",
        }
        run_id = self._client.create_run(
            self._experiment_id,
            run_name=name or f"{len(sharing_map.targets)}/{sharing_map.num_layers} shared",
            tags={key: value[:TAG] for key, value in tags.items() if value},
        ).info.run_id
        params = {"map": str(sharing_map), "origin": result.origin}
        self._log(run_id, metrics=metrics_of(metrics), params=params_of(params))
        self._client.set_terminated(run_id, "FAILED" if result.status == "failed" else "FINISHED")
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
        lost = not_finite(metrics)
        self._log(
            run_id,
            metrics=metrics_of(metrics, step),
            tags=tags_of({"not_finite": lost}) if lost else [],
        )

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set the tags, over those of the same name."""
        self._log(run_id, tags=tags_of(tags))

    def log_text(self, run_id: str, text: str, path: str) -> None:
        """Keep ``text`` as the run's artifact ``path``, UTF-8."""
        self.log_bytes(run_id, text.encode(), path)

    def log_dict(self, run_id: str, values: Mapping[str, Any], path: str) -> None:
        """Keep ``values`` as the run's artifact ``path``, JSON."""
        self.log_text(run_id, json.dumps(values, indent=2, allow_nan=False) + "\n", path)

    def log_bytes(self, run_id: str, content: bytes, path: str) -> None:
        """Keep ``content`` as the run's artifact ``path``; folders in it are made."""
        parent, _, name = path.rpartition("/")
        with tempfile.TemporaryDirectory() as folder, quiet():
            file = Path(folder) / name
            file.write_bytes(content)
            self._client.log_artifact(run_id, str(file), parent or None)

    def log_datasets(self, run_id: str, parts: Mapping[str, tuple[str, str]]) -> None:
        """The run's data: what each part was used for → (its source, its digest)."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        self._client.log_inputs(
            run_id,
            [
                DatasetInput(
                    Dataset(Path(source).name[:TAG], digest, "text", json.dumps({"path": source})),
                    [InputTag("mlflow.data.context", part)],
                )
                for part, (source, digest) in parts.items()
            ],
        )

    def log_map(
        self, run_id: str, sharing_map: SharingMap, metrics: Mapping[str, float], *, name: str
    ) -> None:
        """The run's map as a logged model (its file: ``map.json``), and what it scored.

        A run that has its model keeps it; the metrics are added.
        """
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        outputs = self._client.get_run(run_id).outputs
        if outputs and outputs.model_outputs:
            model_id = outputs.model_outputs[0].model_id
        else:
            model_id = self._client.create_logged_model(
                self._experiment_id,
                name=re.sub(r"[^\w -]", "-", name),
                source_run_id=run_id,
                params={"kv_source_layers": str(sharing_map), "digest": sharing_map.digest},
                model_type="sharing map",
            ).model_id
            with tempfile.TemporaryDirectory() as folder, quiet():
                file = Path(folder) / "map.json"
                file.write_text(sharing_map.to_json() + "\n", encoding="utf-8")
                self._client.log_model_artifact(model_id, str(file))
            self._client.finalize_logged_model(model_id, LoggedModelStatus.READY)
            self._client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
        self._log(run_id, metrics=metrics_of(metrics, model_id=model_id))

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

    def save_view(self, parent_id: str, scores: Sequence[str], *, name: str) -> str:
        """Save a view on the front of a sweep, with charts of ``scores``; returns its address."""
        state = envelope(name, front_view(parent_id, scores))
        self._client.set_experiment_tag(self._experiment_id, VIEW_TAG + parent_id, state)
        options = {"compareRunsMode": "CHART", "viewStateShareKey": parent_id}
        return runs_page(self._host, self._experiment_id, **options)

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        if run_id in self._sampled:
            self._sampled.pop(run_id).stop()
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

    def front_maps(self, run_id: str) -> list[SharingMap]:
        """The maps on the front of a finished sweep; none for any other run, or no run."""
        if not self.exists(run_id):
            return []
        experiment = self._client.get_run(run_id).info.experiment_id
        members = f"tags.`mlflow.parentRunId` = '{run_id}' and tags.front = 'true'"
        runs = self._client.search_runs([experiment], filter_string=members, max_results=1000)
        return [SharingMap.parse(run.data.tags["kv_source_layers"]) for run in runs]

    def run_url(self, run_id: str) -> str:
        """Where the UI shows the run."""
        return runs_page(self._host, self._experiment_id, run_id)
