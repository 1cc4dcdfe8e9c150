"""Make the rows of an ablation: score each plan on held-out windows, and log it as a child run.

`Ablation` asks a `RowScorer` for the row of every map or KV plan that an arm chose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.scorers import Scorers
from kvsharer_exp.cli.steps.ablation_memory import AblationMemory
from kvsharer_exp.measure.score_interval import score_intervals, share_intervals
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.model.sharing.runtime import apply_plan
from kvsharer_exp.reporting.ablation import Row, describe
from kvsharer_exp.search.paper.arms import evaluated
from kvsharer_exp.values.finite import NotFiniteError
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.greedy import GreedyResult
from kvsharer_exp.values.intervals import Interval
from kvsharer_exp.values.score_names import (
    HELD_OUT_KL,
    HELD_OUT_PERPLEXITY,
    Directions,
    PassMarks,
    retained,
    retained_metrics,
)
from kvsharer_exp.values.trial import TrialResult


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one plan, their intervals, and the values behind them (see `Row`)."""

    scores: dict[str, float]
    intervals: dict[str, Interval]
    items: dict[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scores:
        """Read what `to_dict` gave."""
        intervals = {name: Interval(**ends) for name, ends in data["intervals"].items()}
        return cls(data["scores"], intervals, data["items"])


class RowScorer:
    """Scores plans and logs every row as a child run in MLflow; a known plan is not scored again.

    The held-out windows give KL and perplexity in one pass. The report tasks are scored if
    ``ablate.tasks`` asks for them.
    """

    def __init__(
        self,
        config: Config,
        log: RunLog,
        loaded: LoadedModel,
        scorers: Scorers,
        memory: AblationMemory,
    ) -> None:
        self._memory = memory
        self._config, self._log, self._loaded = config, log, loaded
        self._tasks = scorers.report_tasks if config.ablate.tasks else None
        self._evaluator = scorers.of_held_out_windows()
        self._known: dict[tuple[str, ...], Scores] = {}
        self._rows = 0
        # Always measured, because tasks say which way their scores go only once they were scored.
        full = FittedPlan.of(loaded.full_cache)
        self.full = self._known[full.keys] = self._measure(full)
        log.say("scored the full cache")

    @property
    def directions(self) -> Directions:
        """What the tasks say of their scores; empty without tasks."""
        return self._tasks.directions if self._tasks is not None else {}

    @property
    def pass_marks(self) -> PassMarks:
        """What the full cache has to score at least to do each task; empty without tasks."""
        return self._tasks.pass_marks if self._tasks is not None else {}

    def row(
        self,
        variant: Mapping[str, Any],
        arm: str,
        draw: int,
        result: GreedyResult,
        plan: FittedPlan,
    ) -> Row:
        """Make the row of ``result``, which is ``plan``, with its scores.

        Where an arm found nothing, the plan is the full cache and has no scores.
        """
        if not result.found:
            return Row(variant, arm, draw, result, kv_fraction=1.0)
        try:
            measured = self._score(plan)
        except NotFiniteError as error:  # the plan has no scores, which is a result too
            self._log.say(f"{plan.plan}: {error}")
            measured = Scores({}, {}, {})
        held = self._footprint(plan, variant)
        kept = retained(measured.scores, self.full.scores, self.directions, self.pass_marks)
        kept_intervals = share_intervals(
            kept,
            measured.items,
            self.full.items,
            self.directions,
            confidence=self._config.ablate.confidence,
        )
        row = Row(
            variant,
            arm,
            draw,
            result,
            kv_fraction=held.kv_fraction,
            scores=measured.scores,
            intervals={**measured.intervals, **kept_intervals},
            items=measured.items,
            retained=kept,
            plan="" if plan.plan.sharing_map is not None else str(plan.plan),
        )
        return replace(row, mlflow_run_id=self._keep(row, plan, held))

    def _footprint(self, plan: FittedPlan, variant: Mapping[str, Any]) -> Footprint:
        context = variant.get("footprint.context", self._config.footprint.context)
        return footprint(self._loaded.model, plan.plan, context=context)

    def _score(self, plan: FittedPlan) -> Scores:
        if plan.keys not in self._known:
            kept = self._memory.once(["scores", *plan.keys], lambda: self._measure(plan).to_dict())
            self._known[plan.keys] = Scores.from_dict(kept)
        return self._known[plan.keys]

    def _measure(self, plan: FittedPlan) -> Scores:
        measured = self._evaluator.score(plan)
        scores = {HELD_OUT_KL: measured.kl, HELD_OUT_PERPLEXITY: measured.perplexity}
        items = {
            HELD_OUT_KL: list(measured.kls),
            HELD_OUT_PERPLEXITY: [-nll for nll in measured.nlls],
        }
        errors: dict[str, float] = {}
        if self._tasks is not None:
            with apply_plan(self._loaded.model, plan):
                scores |= self._tasks.score()
            items |= self._tasks.item_scores
            errors = self._tasks.stderr()
        confidence, seed = self._config.ablate.confidence, self._config.seed
        intervals = score_intervals(scores, items, errors, confidence=confidence, seed=seed)
        return Scores(scores, intervals, items)

    def _keep(self, row: Row, plan: FittedPlan, held: Footprint) -> str:
        """Log the row; returns the id of its MLflow run."""
        result = row.result
        params = {"arm": row.arm, "compression": result.compression, "draw": row.draw}
        trial = TrialResult(
            number=self._rows,
            params={**params, **row.variant},
            plan=plan.plan,
            scores=row.scores,
            footprint=held,
            status="complete",
            stage_reached="report",
            seconds=result.seconds,
            origin=row.arm,
        )
        more = {
            "requested": result.requested,
            "found": result.found,
            "evaluated": evaluated(result),
            **retained_metrics(
                row.retained, {name: (i.low, i.high) for name, i in row.intervals.items()}
            ),
        }
        words = f"{describe(row.arm, row.variant)} · {result.compression:g}"
        name = f"{self._loaded.name} · {words} · draw {row.draw}"
        self._rows += 1
        return self._log.tracker.log_trial(self._log.run_id, trial, more, name=name)
