"""Answer a budget of memory from a finished sweep of plans, without a model and without scoring.

The command ``plan`` asks here when it is given a budget. The study of the sweep knows the plans
that it scored, and what each action may be. The loss model of the search is fitted to all of its
results, and the plan of least expected loss is solved for the budget. The answer is the best known
plan, unless the solved one is better by more than predictions err. How far the solved plan may be
from the best of that cost is told beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kvsharer_exp.cli.config.plans import FootprintConfig
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.finished_runs import finished_run, names_of, open_runs
from kvsharer_exp.cli.steps.plan_candidates import CLOSE, budgets_of
from kvsharer_exp.reporting.measured import FinishedRun
from kvsharer_exp.search.candidates import priced, smallest
from kvsharer_exp.search.front import best_within, kv_of
from kvsharer_exp.search.outcome import FIT
from kvsharer_exp.search.solver import solve_with_reads
from kvsharer_exp.search.spaces.base import SpaceSetting
from kvsharer_exp.search.spaces.layer_actions import LayerActions
from kvsharer_exp.search.strategies.memory import Memory
from kvsharer_exp.search.strategies.plan_evolution import costs_of
from kvsharer_exp.search.study import open_study
from kvsharer_exp.search.study_store import StudyStore
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.choice import Choice, ReadChoice, Solved
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.ranking import DissimilarityRanking, LayerPair
from kvsharer_exp.values.text import shorten

_SPACE = "layer_actions"
_DOUBT = 0.03  # of a predicted loss, relative: about the median error of the loss model


@dataclass(frozen=True, slots=True)
class Answer:
    """The plan for a budget of ``kv``, a share of the full cache's bytes.

    ``loss`` is measured if the plan is known, and ``trial`` is then the number of its trial. The
    full cache is known without a trial: every loss is measured against it, so its own is 0.

    ``solved`` is the plan of least cost within the budget, known or not, if one was solved, where
    the cost of a plan is the sum of what the study estimates for its layers. No plan costs less
    than ``bound``.
    """

    kv: float
    plan: KVPlan
    status: Literal["known", "predicted"]
    kv_fraction: float
    loss: float
    trial: int | None = None
    solved: Solved | None = None
    bound: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        held = {**asdict(self), "plan": str(self.plan)}
        del held["bound"]
        if self.solved is not None:
            held["solved"] = {
                "plan": str(self.solved.plan),
                "cost": self.solved.loss,
                "bound": self.bound,
                "gap": self.solved.gap(self.bound),
            }
        return held


def sweep_of_plans(config: Config) -> FinishedRun:
    """The sweep of plans that ``run=`` names, or else the newest finished one of the model.

    Raises:
        InputError: there is no such run, or it is no sweep of plans.
    """
    names = names_of(config)
    if len(names) > 1:
        raise InputError(f"plan takes one run, {len(names)} given: give run=<MLflow run id>")
    runs = open_runs(config, names)
    if names:
        found = finished_run(runs, names[0], ("sweep",))
        if found.result.get("search_space") != _SPACE:
            raise InputError(
                f"run {shorten(names[0], 60)} is a sweep of maps: "
                f"give a run of kvsharer sweep search_space={_SPACE}"
            )
        return found
    model = config.model.name
    for stored in runs.recent():
        if (stored.status, stored.command, stored.model) != ("FINISHED", "sweep", model):
            continue
        try:
            found = finished_run(runs, stored.run_id, ("sweep",))
        except InputError:  # of an earlier version
            continue
        if found.result.get("search_space") == _SPACE:
            return found
    raise InputError(
        f"no finished sweep of plans of model {shorten(model, 40)} in this store: give run=, or "
        f"run kvsharer sweep search_space={_SPACE} first"
    )


@contextmanager
def study_of(config: Config, run: FinishedRun) -> Iterator[PlanStudy]:
    """Open the study of a sweep, in the storage that the sweep used; nothing is written to it.

    ``study.storage`` and ``tracking.folder`` of this command come before the recorded ones.

    Raises:
        InputError: the study is not there, is being run, or belongs to another run by now.
    """
    name, held = str(run.result["study"]), run.config
    storage = config.study.storage or (held.get("study") or {}).get("storage")
    recorded = (held.get("tracking") or {}).get("folder") or config.tracking.folder
    folders = [Path(folder) / "studies" for folder in (config.tracking.folder, recorded)]
    folder = next((f for f in folders if (f / f"{name}.lock").is_file()), folders[0])
    journal = Path(storage or folder / f"{name}.journal")
    if "://" not in str(storage) and not journal.is_file():
        raise InputError(
            f"the study of run {run.run_id} is not in {shorten(str(journal), 80)}: "
            "give tracking.folder or study.storage"
        )
    with open_study(name, storage=storage, folder=folder) as store:
        if not store.candidates or not store.results():
            raise InputError(
                f"study {shorten(name, 60)} holds no plan: check study.storage, or run the sweep "
                "again"
            )
        if store.mlflow_run_id != run.run_id:
            raise InputError(
                f"study {shorten(name, 60)} was made again by run {store.mlflow_run_id}: "
                f"give run={store.mlflow_run_id}"
            )
        yield PlanStudy(store)


class PlanStudy:
    """What a study of plans knows: its results, its candidates, and a loss model of the results."""

    def __init__(self, store: StudyStore) -> None:
        candidates = tuple(store.candidates or ())
        layers = 1 + max(candidate.layer for candidate in candidates)
        # Plans are solved from the candidates alone, and the space asks for some ranking.
        ranking = DissimilarityRanking("", "", layers, (LayerPair(1, 0, 0.0),))
        space = LayerActions(SpaceSetting(ranking, layers - 1, candidates=candidates))
        self._space, self._memory, self.results = space, Memory(space), store.results()
        self._memory.update(store.study)
        self._mean = self._memory.model.draw(np.random.default_rng(0), 0.0)
        self._solutions: dict[float, tuple[Solved, float] | None] = {}

    def budgets(self, config: Config, context: int) -> tuple[float, ...]:
        """The budgets asked for, as shares of the full cache's bytes at ``context``.

        Raises:
            InputError: one is below what the smallest plan keeps, or above the full cache, or the
                sweep had another context in mind.
        """
        given, in_gib = config.footprint.context, config.compression.kv_gib is not None
        if given != context and (in_gib or given != FootprintConfig().context):
            raise InputError(
                f"the sweep counted memory at footprint.context={context}, not {given}: "
                f"give footprint.context={context}, or sweep at {given}"
            )
        return budgets_of(config, self._space.full_bytes, self.least)

    @cached_property
    def least(self) -> float:
        """The share of the full cache's bytes that the smallest plan keeps, known or not."""
        solved = smallest(self._space.setting.candidates) / self._space.full_bytes
        return min([solved, *map(kv_of, self.results)])

    def within(self, kv: float) -> Answer:
        """The best known plan within ``kv``, or the plan solved for ``kv`` if it is clearly better.

        A budget of the full cache's bytes is answered by the full cache, if every layer may own.

        Raises:
            InputError: no plan within ``kv`` was scored, but for the solved one, which failed.
        """
        if kv + CLOSE >= 1 and self._full_is_allowed:
            return Answer(kv, KVPlan.full(self._space.ranking.num_layers), "known", 1.0, 0.0)
        answers = [answer for answer in (self._known(kv), self._predicted(kv)) if answer]
        if not answers:
            raise InputError(
                f"the plan for compression.kv={kv:g} failed when it was scored: give more"
            )
        doubt = {"known": 0.0, "predicted": _DOUBT}
        best = min(answers, key=lambda answer: answer.loss * (1 + doubt[answer.status]))
        solved, bound = self._solved(kv) or (None, 0.0)
        return replace(best, solved=solved, bound=bound)

    @property
    def _full_is_allowed(self) -> bool:
        owning = {c.layer for c in self._space.setting.candidates if c.action == Own()}
        return len(owning) == self._space.ranking.num_layers

    def _known(self, kv: float) -> Answer | None:
        best = best_within(self.results, kv + CLOSE)
        if best is None:
            return None
        loss = best.scores.get(FIT, -(best.score or 0.0))
        return Answer(kv, best.plan, "known", kv_of(best), loss, best.number)

    def _predicted(self, kv: float) -> Answer | None:
        """The plan of least cost at the estimated costs; None if it was scored, or none fits."""
        found = self._solved(kv)
        if found is None:
            return None
        solved, _ = found
        if any(result.plan == solved.plan for result in self.results):
            return None
        (loss,) = self._memory.model.expected([solved.plan], self._mean)
        share = solved.kv_bytes / self._space.full_bytes
        return Answer(kv, solved.plan, "predicted", share, float(loss))

    def _solved(self, kv: float) -> tuple[Solved, float] | None:
        """The plan of least cost within ``kv`` and the bound; None if none fits."""
        if kv not in self._solutions:
            most = int((kv + CLOSE) * self._space.full_bytes)
            try:
                self._solutions[kv] = solve_with_reads(*self._priced, most)
            except InputError:
                self._solutions[kv] = None
        return self._solutions[kv]

    @cached_property
    def _priced(self) -> tuple[list[Choice], list[ReadChoice]]:
        """What each layer may do, at the estimated costs."""
        return priced(self._space.setting.candidates, costs_of(self._memory, self._mean))
