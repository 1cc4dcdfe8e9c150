"""Make the rows of an ablation: score each map on held-out windows, and log it as a child run.

`Ablation` asks a `RowScorer` for the row of every map that an arm chose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.scorers import Scorers
from kvsharer_exp.measure.score_interval import score_intervals
from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.model.sharing.runtime import share_kv
from kvsharer_exp.reporting.ablation import Row, describe
from kvsharer_exp.search.paper.arms import evaluated
from kvsharer_exp.values.finite import NotFiniteError
from kvsharer_exp.values.greedy import GreedyResult
from kvsharer_exp.values.intervals import Interval
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.score_names import HELD_OUT_KL, HELD_OUT_PERPLEXITY, Directions, retained
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import TrialResult


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one map, their intervals, and the values behind them (see `Row`)."""

    scores: dict[str, float]
    intervals: dict[str, Interval]
    items: dict[str, list[float]]


class RowScorer:
    """Scores maps and logs every row as a child run in MLflow; a known map is not scored again.

    The held-out windows give KL and perplexity in one pass. The report tasks are scored if
    ``ablate.tasks`` asks for them.
    """

    def __init__(self, config: Config, log: RunLog, loaded: LoadedModel, scorers: Scorers) -> None:
        self._config, self._log, self._loaded = config, log, loaded
        self._tasks = scorers.report_tasks if config.ablate.tasks else None
        self._evaluator = scorers.of_held_out_windows()
        self._known: dict[str, Scores] = {}
        self._rows = 0
        self.full = self._score(loaded.full_cache)
        log.say("scored the full cache")

    @property
    def directions(self) -> Directions:
        """What the tasks say of their scores; empty without tasks."""
        return self._tasks.directions if self._tasks is not None else {}

    def row(self, variant: Mapping[str, Any], arm: str, draw: int, result: GreedyResult) -> Row:
        """Make the row of ``result`` with its scores. A map that shares no layer has no scores."""
        sharing_map = SharingMap(result.kv_source_layers)
        if not result.found:
            return Row(variant, arm, draw, result, kv_fraction=1.0)
        try:
            measured = self._score(sharing_map)
        except NotFiniteError as error:  # the map has no scores, which is a result too
            self._log.say(f"{sharing_map}: {error}")
            measured = Scores({}, {}, {})
        row = Row(
            variant,
            arm,
            draw,
            result,
            kv_fraction=footprint(self._loaded.model, sharing_map).kv_fraction,
            scores=measured.scores,
            intervals=measured.intervals,
            items=measured.items,
            retained=retained(measured.scores, self.full.scores, self.directions),
        )
        return replace(row, mlflow_run_id=self._keep(row, sharing_map))

    def _score(self, sharing_map: SharingMap) -> Scores:
        if sharing_map.digest not in self._known:
            self._known[sharing_map.digest] = self._measure(sharing_map)
        return self._known[sharing_map.digest]

    def _measure(self, sharing_map: SharingMap) -> Scores:
        measured = self._evaluator.score(sharing_map)
        scores = {HELD_OUT_KL: measured.kl, HELD_OUT_PERPLEXITY: measured.perplexity}
        items = {
            HELD_OUT_KL: list(measured.kls),
            HELD_OUT_PERPLEXITY: [-nll for nll in measured.nlls],
        }
        errors: dict[str, float] = {}
        if self._tasks is not None:
            with share_kv(self._loaded.model, sharing_map):
                scores |= self._tasks.score()
            items |= self._tasks.item_scores
            errors = self._tasks.stderr()
        confidence, seed = self._config.ablate.confidence, self._config.seed
        intervals = score_intervals(scores, items, errors, confidence=confidence, seed=seed)
        return Scores(scores, intervals, items)

    def _keep(self, row: Row, sharing_map: SharingMap) -> str:
        """Log the row; returns the id of its MLflow run."""
        result = row.result
        params = {"arm": row.arm, "compression": result.compression, "draw": row.draw}
        trial = TrialResult(
            number=self._rows,
            params={**params, **row.variant},
            plan=KVPlan.of(sharing_map),
            scores=row.scores,
            footprint=footprint(self._loaded.model, sharing_map),
            status="complete",
            stage_reached="report",
            seconds=result.seconds,
            origin=row.arm,
        )
        more = {
            "requested": result.requested,
            "found": result.found,
            "evaluated": evaluated(result),
            **{f"retained/{name}": value for name, value in row.retained.items()},
        }
        words = f"{describe(row.arm, row.variant)} · {result.compression:g}"
        name = f"{self._loaded.name} · {words} · draw {row.draw}"
        self._rows += 1
        return self._log.tracker.log_trial(self._log.run_id, trial, more, name=name)
