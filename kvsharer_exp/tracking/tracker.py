"""Write the runs of one experiment to MLflow.

Every command that keeps a run writes it with a `Tracker`. `Runs` reads those of earlier commands.

It uses `MlflowClient` only, never MLflow's global fluent state. So a child run costs one call to
create it, one batch, and one call to end it. https://mlflow.org/docs/latest/tracking.html
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvsharer_exp.tracking.leftovers import close_children, close_study, delete_trials, link
from kvsharer_exp.tracking.logged_models import model_of
from kvsharer_exp.tracking.patience import waiting_of
from kvsharer_exp.tracking.runs import Runs
from kvsharer_exp.tracking.server import UI, runs_page
from kvsharer_exp.tracking.store import open_store, quiet
from kvsharer_exp.tracking.system import AFTER_SECONDS, SystemMetrics
from kvsharer_exp.tracking.values import TAG, metrics_of, not_finite, params_of, tags_of
from kvsharer_exp.tracking.views import VIEW_TAG, envelope, front_view
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import TrialResult

# MLflow takes at most 100 params, 100 tags and 1000 values of all kinds in one call.
_PARAMS, _METRICS = 100, 800


class Tracker:
    """Writes the runs of one experiment."""

    def __init__(
        self, client: Any, experiment_id: str, *, sample_after_seconds: float = AFTER_SECONDS
    ) -> None:
        self._client = client
        self._experiment_id = experiment_id
        self._sample_after_seconds = sample_after_seconds
        self._sampled: dict[str, SystemMetrics] = {}
        self.waiting = waiting_of(client)
        uri = client.tracking_uri
        self._host = uri.rstrip("/") if uri.startswith("http") else UI

    @classmethod
    def open(
        cls,
        uri: str = "sqlite:///mlruns/mlflow.db",
        experiment: str = "kvsharer_exp",
        artifacts: str = "mlruns/artifacts",
    ) -> Tracker:
        """Open the experiment in the store at ``uri``; both are made if they are not there.

        ``artifacts`` is the folder for the files of a local store. A server has a place of its own.

        Raises:
            InputError: the store cannot be opened or written.
        """
        return cls(*open_store(uri, experiment, artifacts))

    @property
    def runs(self) -> Runs:
        """The runs of the same store."""
        return Runs(self._client, self._experiment_id)

    def start_run(
        self,
        name: str,
        *,
        tags: Mapping[str, str],
        params: Mapping[str, str],
        run_id: str | None = None,
    ) -> str:
        """Begin a new run, or continue ``run_id``, whose params keep their first value."""
        known = run_id
        if run_id is None:
            run = self._client.create_run(self._experiment_id, run_name=name, tags=dict(tags))
            run_id = run.info.run_id
        self._sampled[run_id] = SystemMetrics(
            self._client.tracking_uri, run_id, self._sample_after_seconds
        )
        if known:
            self._client.update_run(run_id, status="RUNNING")
            self.set_tags(run_id, tags)
        held = self._client.get_run(run_id).data.params
        self._log(run_id, params=[param for param in params_of(params) if param.key not in held])
        return run_id

    def log_trial(
        self, parent_id: str, result: TrialResult, more: Mapping[str, float], *, name: str = ""
    ) -> str:
        """Write a child run with the plan, scores and footprint of one trial; returns its id.

        ``more`` holds further metrics. What the sampler drew is one tag, because a param per layer
        would bury the few params that are worth comparing. The run is FAILED only if its trial
        failed. A trial that was screened out did what it was asked.
        """
        plan, sharing_map = result.plan, result.sharing_map
        metrics = {
            **result.scores,
            "kv_fraction": result.footprint.kv_fraction,
            "kv_bytes_per_token": result.footprint.kv_bytes_per_token,
            "num_shared": result.num_shared,
            "seconds": result.seconds,
            **({} if result.score is None else {"score": result.score}),
            **more,
        }
        tags = {
            "mlflow.parentRunId": parent_id,
            "digest": plan.digest,
            "kv_source_layers": str(sharing_map or ""),
            "plan": str(plan),
            "num_shared": str(result.num_shared),
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
            run_name=name or f"{result.num_shared}/{plan.num_layers} shared",
            tags={key: value[:TAG] for key, value in tags.items() if value},
        ).info.run_id
        params = {"map" if sharing_map else "plan": str(plan), "origin": result.origin}
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
        """Log in as few calls as MLflow's limits allow, and in none if there is nothing."""
        while metrics or params or tags:
            self._client.log_batch(run_id, metrics[:_METRICS], params[:_PARAMS], tags[:_PARAMS])
            metrics, params, tags = metrics[_METRICS:], params[_PARAMS:], tags[_PARAMS:]

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log the finite values; the names of all others go into the tag ``not_finite``."""
        lost = not_finite(metrics)
        tags = tags_of({"not_finite": lost}) if lost else []
        self._log(run_id, metrics=metrics_of(metrics, step), tags=tags)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set the tags; a tag of the same name is replaced."""
        self._log(run_id, tags=tags_of(tags))

    def log_text(self, run_id: str, text: str, path: str) -> None:
        """Keep ``text`` as the run's artifact ``path``, in UTF-8."""
        self.log_bytes(run_id, text.encode(), path)

    def log_dict(self, run_id: str, values: Mapping[str, Any], path: str) -> None:
        """Keep ``values`` as the run's artifact ``path``, in JSON."""
        self.log_text(run_id, json.dumps(values, indent=2, allow_nan=False) + "\n", path)

    def log_bytes(self, run_id: str, content: bytes, path: str) -> None:
        """Keep ``content`` as the run's artifact ``path``; its folders are made."""
        parent, _, name = path.rpartition("/")
        with tempfile.TemporaryDirectory() as folder, quiet():
            file = Path(folder) / name
            file.write_bytes(content)
            self._client.log_artifact(run_id, str(file), parent or None)

    def log_folder(self, run_id: str, folder: Path) -> None:
        """Keep the files of ``folder`` as artifacts in a folder of the same name."""
        with quiet():
            self._client.log_artifacts(run_id, str(folder), folder.name)

    def log_datasets(self, run_id: str, parts: Mapping[str, tuple[str, str]]) -> None:
        """Log the run's data; ``parts``: what each part was used for → (its source, its digest)."""
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
        self,
        run_id: str,
        plan: SharingMap | KVPlan,
        metrics: Mapping[str, float],
        *,
        name: str,
        about: Mapping[str, str] | None = None,
    ) -> None:
        """Log the run's map or plan as a logged model with a file, and what it scored.

        The file is ``map.json``, or ``plan.json`` for a plan that is no map. ``about`` holds
        further params of run and model: what the plan does, in text and in counts. If the run has
        a logged model already, the metrics are added to that one.
        """
        plan, about = KVPlan.of(plan), dict(about or {})
        if plan.sharing_map is None:
            self.set_tags(run_id, {"plan": str(plan), "digest": plan.digest})
        model_id = model_of(self._client, self._experiment_id, run_id, plan, name, about)
        self._log(run_id, metrics=metrics_of(metrics, model_id=model_id), params=params_of(about))

    def mark_front(self, members: Iterable[str], before: Iterable[str] = ()) -> None:
        """Tag ``members`` as ``front=true``, and the others of ``before`` as ``front=false``.

        A run of ``before`` that has been deleted in the UI is passed over.
        """
        members = set(members)
        for run_id in filter(self.exists, set(before) - members):
            self.set_tags(run_id, {"front": "false"})
        for run_id in members:
            self.set_tags(run_id, {"front": "true"})

    def save_view(self, parent_id: str, scores: Sequence[str], *, name: str) -> str:
        """Save a view on the front of a sweep, with charts of ``scores``; returns its address."""
        state = envelope(name, front_view(parent_id, scores))
        self._client.set_experiment_tag(self._experiment_id, VIEW_TAG + parent_id, state)
        options = {"compareRunsMode": "CHART", "viewStateShareKey": parent_id}
        return runs_page(self._host, self._experiment_id, **options)

    def finish(self, run_id: str, status: str = "FINISHED", *, successor: str = "") -> None:
        """End the run as FINISHED, FAILED or KILLED; a child run that is still open is KILLED.

        ``successor``: the run that goes on in its place, if any; the two are linked.
        """
        if run_id in self._sampled:
            self._sampled.pop(run_id).stop()
        if status != "FINISHED":
            close_children(self._client, self._experiment_id, run_id)
        if successor:
            link(self._client, run_id, successor)
        self._client.set_terminated(run_id, status)

    def finish_all(self, status: str) -> None:
        """End every run that this tracker has started and not ended, as `finish` does."""
        for run_id in list(self._sampled):
            self.finish(run_id, status)

    def close_left_open(self, key: str, run_id: str, trials: Collection[str]) -> None:
        """Put in order what killed processes left of the study ``key``, which now runs as `run_id`.

        Their open runs are ended as KILLED, and linked with what comes after them. Of the child
        runs of ``run_id``, those that are not in ``trials`` are deleted: they may be incomplete.
        """
        close_study(self._client, self._experiment_id, key, but=run_id)
        delete_trials(self._client, self._experiment_id, run_id, trials)

    def exists(self, run_id: str) -> bool:
        """Whether the store holds the run and it is not deleted."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            # No run has a malformed id. Any other error does not say whether the run exists.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return False
            raise

    def front_maps(self, run_id: str) -> list[SharingMap]:
        """The maps on the front of a finished sweep; empty for another run, or if there is none.

        Plans of the front that are no maps are left out.
        """
        if not self.exists(run_id):
            return []
        experiment = self._client.get_run(run_id).info.experiment_id
        members = f"tags.`mlflow.parentRunId` = '{run_id}' and tags.front = 'true'"
        runs = self._client.search_runs([experiment], filter_string=members, max_results=1000)
        texts = [run.data.tags.get("kv_source_layers") for run in runs]
        return [SharingMap.parse(text) for text in texts if text is not None]

    def run_url(self, run_id: str) -> str:
        """The address at which the UI shows the run."""
        return runs_page(self._host, self._experiment_id, run_id)
