"""How ``ablate`` scores a map: held-out windows in one pass, report tasks when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvsharer_exp.cli.commands.session import Session
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.score_interval import score_interval
from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.model.sharing.runtime import share_kv
from kvsharer_exp.reporting.ablation import KL, PERPLEXITY, Row, describe
from kvsharer_exp.search.paper.arms import evaluated
from kvsharer_exp.values.greedy import GreedyResult
from kvsharer_exp.values.intervals import Interval
from kvsharer_exp.values.score_names import retained
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import TrialResult


@dataclass(frozen=True, slots=True)
class Scores:
    """One map's scores with what stands behind them (see `ablation.Row`)."""

    scores: dict[str, float]
    intervals: dict[str, Interval]
    items: dict[str, list[float]]


class Scorer:
    """Scores maps, a map met again free of charge; every row is a child run in MLflow."""

    def __init__(self, session: Session) -> None:
        self._session = session
        scoring = session.config.scoring
        self._evaluator = Evaluator(
            session.model,
            session.report_windows,
            batch_size=scoring.batch_size,
            memory_budget=session.memory_budget,
        )
        self._known: dict[str, Scores] = {}
        self._rows = 0
        self.full = self._score(SharingMap.identity(session.num_layers))
        session.say("scored the full cache")

    def row(self, variant: Mapping[str, Any], arm: str, draw: int, result: GreedyResult) -> Row:
        """``result`` with its scores; none where it shares no layer."""
        sharing_map = SharingMap(result.kv_source_layers)
        if not result.found:
            return Row(variant, arm, draw, result, kv_fraction=1.0)
        measured = self._score(sharing_map)
        row = Row(
            variant,
            arm,
            draw,
            result,
            kv_fraction=footprint(self._session.model, sharing_map).kv_fraction,
            scores=measured.scores,
            intervals=measured.intervals,
            items=measured.items,
            retained=retained(measured.scores, self.full.scores),
        )
        return replace(row, mlflow_run_id=self._log(row, sharing_map))

    def _score(self, sharing_map: SharingMap) -> Scores:
        if sharing_map.digest not in self._known:
            self._known[sharing_map.digest] = self._measure(sharing_map)
        return self._known[sharing_map.digest]

    def _measure(self, sharing_map: SharingMap) -> Scores:
        session = self._session
        measured = self._evaluator.score(sharing_map)
        scores = {KL: measured.kl, PERPLEXITY: measured.perplexity}
        items = {KL: list(measured.kls), PERPLEXITY: [-nll for nll in measured.nlls]}
        errors: dict[str, float] = {}
        tasks = session.report_tasks if session.config.ablate.tasks else None
        if tasks is not None:
            with share_kv(session.model, sharing_map):
                scores |= tasks.score()
            items |= tasks.item_scores
            errors = tasks.stderr()
        intervals = {
            name: score_interval(
                name,
                value,
                items.get(name, []),
                confidence=session.config.ablate.confidence,
                stderr=errors.get(name),
                seed=session.config.seed,
            )
            for name, value in scores.items()
        }
        return Scores(scores, {n: i for n, i in intervals.items() if i is not None}, items)

    def _log(self, row: Row, sharing_map: SharingMap) -> str:
        session, result = self._session, row.result
        size = footprint(session.model, sharing_map)
        params = {"arm": row.arm, "compression": result.compression, "draw": row.draw}
        trial = TrialResult(
            number=self._rows,
            params={**params, **row.variant},
            sharing_map=sharing_map,
            scores=row.scores,
            footprint=size,
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
        name = f"{session.config.model.name} · {words} · draw {row.draw}"
        self._rows += 1
        return session.tracker.log_trial(session.run_id, trial, more, name=name)
