"""Make the entries of a sweep's front: score every map on what the search never saw.

The command ``sweep`` makes them at its end, for the front and for the paper's maps that are not on
it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import cached_property

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.scorers import Scorers
from kvsharer_exp.cli.steps.sweep_progress import size_of
from kvsharer_exp.measure.held_out import HeldOutScores
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.search.execution.base import PLAN_FAULTS, reason_of
from kvsharer_exp.search.outcome import KL_VARIANCE
from kvsharer_exp.search.study_store import HeldOut, StudyStore
from kvsharer_exp.values.intervals import CONFIDENCE, t_quantile
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.score_names import KL, retained
from kvsharer_exp.values.trial import FrontEntry, TrialResult


class EntryMaker:
    """Makes the entries of results. Held-out scores that the study keeps are not measured again.

    ``full_tasks``: the scores of the full cache on the search tasks. ``fitted``: gives a plan the
    fits of its stand-ins.
    """

    def __init__(
        self,
        config: Config,
        log: RunLog,
        loaded: LoadedModel,
        scorers: Scorers,
        store: StudyStore,
        full_tasks: Mapping[str, float],
        fitted: Callable[[KVPlan], FittedPlan] = FittedPlan.of,
    ) -> None:
        self._log, self._store, self._scorers = log, store, scorers
        self._held_out, self._fitted = scorers.held_out(), fitted
        self._weights = config.scoring.weights
        self._num_windows = scorers.fitness.num_windows
        given = config.scoring.task_metadata  # what came later is left out at its default
        wanted = {
            **{"report": asdict(config.scoring.report), "heldout": asdict(config.heldout)},
            **({"task_metadata": given} if given else {}),
        }
        text = json.dumps(wanted, sort_keys=True)
        self._key = hashlib.sha256(text.encode()).hexdigest()[:8]
        self._kept = store.held_out(self._key)
        self._full = KVPlan.of(loaded.full_cache)
        held_out, self.full_intervals = self._score(self._full)
        self.full_scores: dict[str, float] = {
            **scorers.fitness.full_scores.named(),
            **full_tasks,
            **held_out,
        }

    def make(self, result: TrialResult) -> FrontEntry:
        """Make the entry of ``result``, with those of its scores that the full cache has too."""
        plan, full = result.plan, self.full_scores
        try:
            held_out, intervals = self._score(plan)
        except PLAN_FAULTS as error:  # it has the scores of the search and no others
            self._log.say(f"{plan} has no report scores ({reason_of(error)})")
            held_out, intervals = {}, {}
        scores = {**result.scores, **held_out}
        scores = {name: value for name, value in scores.items() if name in full}
        self._log.say(f"{size_of(result)} ({result.origin}): report scores done")
        kl = self._kl_interval(result)
        return FrontEntry(
            kv_source_layers=None
            if result.sharing_map is None
            else result.sharing_map.kv_source_layers,
            digest=plan.digest,
            num_shared=result.num_shared,
            kv_fraction=result.footprint.kv_fraction,
            scores=scores,
            retained=retained(scores, full, self._scorers.directions, self._scorers.pass_marks),
            mlflow_run_id=self._store.map_run(plan),
            origin=result.origin,
            intervals={**({KL: list(kl)} if kl is not None else {}), **intervals},
            plan=str(plan),
            kv_bytes_per_token=result.footprint.kv_bytes_per_token,
            footprint_context=result.footprint.context,
            parameter_bytes_saved=result.footprint.parameter_bytes_saved,
        )

    def score_intervals(self, results: Iterable[TrialResult]) -> dict[str, tuple[float, float]]:
        """By a map's digest, the two ends between which its score probably lies.

        They are known only if the score is minus the KL.
        """
        found: dict[str, tuple[float, float]] = {}
        for result in results if self._weights == {KL: 1} else ():
            interval = self._kl_interval(result)
            if result.score is not None and interval is not None and not _is_full(result.plan):
                low, high = interval
                found[result.plan.digest] = (-high, -low)
        return found

    def _score(self, plan: KVPlan) -> HeldOut:
        """The held-out scores of a plan and their intervals, measured once, kept in the study."""
        if plan.digest not in self._kept:
            measured = self._of_full if plan == self._full else self._beside_full(plan)
            self._kept[plan.digest] = dict(measured.scores), measured.ends
            self._store.keep_held_out(self._key, self._kept)
        return self._kept[plan.digest]

    @cached_property
    def _of_full(self) -> HeldOutScores:
        """The full cache's, with items; a study keeps no items, so they may be measured again."""
        return self._held_out.score(self._full)

    def _beside_full(self, plan: KVPlan) -> HeldOutScores:
        """The scores of a plan, with intervals of what it retains of the full cache's."""
        told, full = self._scorers, self._of_full
        measured = self._held_out.score(self._fitted(plan))
        shares = retained(measured.scores, full.scores, told.directions, told.pass_marks)
        return measured.beside(full, shares, told.directions)

    def _kl_interval(self, result: TrialResult) -> tuple[float, float] | None:
        """The 95 % interval of a map's KL over scoring windows, by Student's t and not below 0.

        It is None for a single window, and in a study begun before variances were kept.
        """
        windows = self._num_windows
        if windows < 2 or KL_VARIANCE not in result.scores:
            return None
        error = math.sqrt(result.scores[KL_VARIANCE] / windows)
        half = t_quantile(CONFIDENCE, windows - 1) * error
        return max(0.0, result.scores[KL] - half), result.scores[KL] + half


def _is_full(plan: KVPlan) -> bool:
    return plan == KVPlan.full(plan.num_layers)
