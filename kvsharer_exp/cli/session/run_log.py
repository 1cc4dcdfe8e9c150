"""The log of one run of a command: what the run says, what it keeps, and how it ends.

Every command that loads a model is given a `RunLog`. The run has a folder, which Hydra makes, and a
run in MLflow. The MLflow run begins with `RunLog.start`, once all cheap checks have passed.
Whatever happens then, it ends as FINISHED, FAILED or KILLED, unless the MLflow server is away. What
such a server does not get is in the run folder, and the same command delivers it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from rich.text import Text

from kvsharer_exp.cli.config.compose import to_yaml
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.finished_runs import require_runs
from kvsharer_exp.cli.session.first_run import first_run
from kvsharer_exp.cli.session.result_file import head, write_result
from kvsharer_exp.cli.stopping import undisturbed
from kvsharer_exp.cli.terminal import make_console
from kvsharer_exp.data.passages import TextParts
from kvsharer_exp.model.files import make_folder
from kvsharer_exp.tracking.environment import environment
from kvsharer_exp.tracking.patience import PATIENCE, MlflowAwayError
from kvsharer_exp.tracking.tracker import Tracker
from kvsharer_exp.values.errors import UnansweredError
from kvsharer_exp.values.text import clip, shorten

_log = logging.getLogger(__name__)

_MODEL_KEYS = ("id", "num_layers", "num_key_value_heads", "head_dim")  # those in result.json


class RunLog:
    """Opens the MLflow store, says what a first run downloads, and is the context of the run."""

    def __init__(self, config: Config) -> None:
        """Open the store, and print what a first run downloads.

        Raises:
            InputError: the store cannot be opened, or ``tracking.folder`` cannot be written; or a
                run of a store that is not there is to be read.
        """
        require_runs(config)
        self.config = config
        self.folder = Path(HydraConfig.get().runtime.output_dir)
        self.console = make_console()
        # A first download or conversion takes a while, and the loggers of `model` say so. That of
        # `load_passages` says how it read a text file.
        level = logging.WARNING if config.quiet else logging.INFO
        for name in ("kvsharer_exp.model", "kvsharer_exp.data.load"):
            logging.getLogger(name).setLevel(level)
        if not config.quiet:
            for line in first_run(config):
                self.console.print(line, markup=False)
        tracking = config.tracking
        make_folder(Path(tracking.folder), "tracking.folder")
        self.tracker = Tracker.open(tracking.uri, tracking.experiment, tracking.artifacts)
        self.started = time.perf_counter()
        self.run_id = ""
        self.missing: list[str] = []  # what the server of MLflow did not get
        self.environment = environment()
        self._model: Mapping[str, Any] = {}
        self._texts: Mapping[str, str] = {}

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
        status = "FINISHED" if error is None else "KILLED" if stopped else "FAILED"
        with undisturbed():
            try:
                # Nobody who has stopped the run, or whose run has failed, is kept waiting.
                with self.tracker.waiting(PATIENCE if error is None else 0.0):
                    self.tracker.finish_all(status)
            except MlflowAwayError:
                if error is None:
                    raise
                _log.warning("the MLflow run %s stays open until the next start", self.run_id)

    @property
    def seconds(self) -> float:
        """The seconds since this log was made."""
        return time.perf_counter() - self.started

    def say(self, text: str) -> None:
        """Print a line about progress, unless ``quiet`` is set."""
        if not self.config.quiet:
            self.console.print(Text.assemble((f"{self.seconds:6.1f} s", "dim"), f"  {text}"))

    def start(
        self,
        model: Mapping[str, Any],
        texts: TextParts,
        *,
        run_id: str | None = None,
        **tags: str,
    ) -> None:
        """Begin the MLflow run, or continue ``run_id``.

        The run is given the configuration, the environment and the fingerprints of the data.
        ``model``: what `describe` says of the model. ``tags``: further tags of the run.
        """
        config, self._model, self._texts = self.config, model, texts.fingerprints
        self.run_id = self.tracker.start_run(
            f"{config.model.name} · {config.command}",
            tags={
                "command": config.command,
                "model": config.model.name,
                "model_id": str(model["id"]),
                **{f"text.{part}": digest for part, digest in self._texts.items()},
                **{f"environment.{name}": value for name, value in self.environment.items()},
                **tags,
            },
            params={**flatten(asdict(config)), **flatten({"described": model})},
            run_id=run_id,
        )
        self.tracker.log_datasets(
            self.run_id,
            {part: (texts.sources[part], digest) for part, digest in self._texts.items()},
        )
        self.tracker.log_text(self.run_id, to_yaml(config), "config.yaml")

    def keep(self, name: str, content: bytes | str) -> None:
        """Write ``content`` as the file ``name`` of the run folder, and keep it in MLflow too."""
        data = content.encode() if isinstance(content, str) else content
        (self.folder / name).write_bytes(data)
        with self.delivering(name):
            self.tracker.log_bytes(self.run_id, data, name)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Add metrics to the MLflow run."""
        with self.delivering("metrics"):
            self.tracker.log_metrics(self.run_id, metrics, step=step)

    @contextmanager
    def delivering(self, what: str) -> Iterator[None]:
        """Go on behind the block if the MLflow server stays away; `finish` says what is missing."""
        try:
            yield
        except MlflowAwayError:
            self.missing.append(what)

    def finish(self, result: Mapping[str, Any], *, then: str) -> None:
        """Write ``result.json`` into the run folder and MLflow, and say what to try next.

        Raises:
            UnansweredError: the MLflow server was away, and something is missing there.
        """
        text = write_result(
            self.folder,
            {
                **head(
                    self.config,
                    model={key: self._model[key] for key in _MODEL_KEYS},
                    seconds=self.seconds,
                    mlflow_run_id=self.run_id,
                    versions=self.environment,
                ),
                "texts": self._texts,
                **result,
            },
        )
        with self.delivering("result.json"):
            self.tracker.log_text(self.run_id, text, "result.json")
        self.console.print(f"\nresult   {self.folder / 'result.json'}", markup=False)
        if self.missing:
            missing = clip(", ".join(dict.fromkeys(self.missing)), 60)
            raise UnansweredError(
                f"MLflow did not answer and lacks {missing}: all is in {shorten(self.folder, 50)}, "
                "and the same command delivers it"
            )
        if self.config.quiet:
            return
        self.console.print(f"mlflow   {self.tracker.run_url(self.run_id)}   (kvsharer ui shows it)")
        if "mlflow_compare_url" in result:
            self.console.print(f"compare  {result['mlflow_compare_url']}")
        self.console.print(f"next     {then}", markup=False)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested mappings to one, with keys like ``a.b.c`` and every value as text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
