"""Score a candidate map in stages, the cheap ones first, so that a bad map costs little.

A sweep makes a `StagedScorer`, here or in a worker, and an executor calls it for every new map. The
stages are:

- ``screen/<n>``: the map is scored on the first n scoring windows. It stops here if a map with no
  more KV beats it there by more than a margin.
- ``fit``: it is scored on all scoring windows.
- ``tasks``: lm-eval scores it on the search tasks, if it is still on the front. If lm-eval is part
  of the fitness, every map comes this far.

Staged selection follows EvoPress, https://arxiv.org/abs/2410.14649.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from statistics import fmean, variance
from typing import Any

from torch import nn

from kvsharer_exp.measure.batch_size import BatchSize
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.scoring import TaskScorer
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.sharing.runtime import apply_plan
from kvsharer_exp.search.fitness import FITNESSES, find_fitness
from kvsharer_exp.search.outcome import FIT, KL_VARIANCE, Bar, Outcome, screen, screens, stage
from kvsharer_exp.values.correlation import kendall
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.finite import NotFiniteError, finite
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.score_names import ScoreName, retained
from kvsharer_exp.values.scores import CandidateScores
from kvsharer_exp.values.trial import TrialResult


class StagedScorer:
    """Scores maps in stages, and compares them with the results so far.

    The score of a map is minus the weighted sum of its losses. ``reference_score`` is the score of
    a map whose losses are the references of `Fitness`. ``full_tasks`` holds the full cache's scores
    on the search tasks, and ``screens`` how many windows each ``screen`` stage has seen.

    Args:
        evaluator: scores maps on the scoring windows.
        fitness: the weight of each loss: ``kl`` (nats), ``perplexity`` (increase of the loss,
            nats), ``cosine`` (1 - cosine), ``lm_eval`` (1 - mean retained).
        tasks: scores the search tasks; None if there are none.
        screen_windows: how many of the evaluator's windows each ``screen`` stage has seen. Numbers
            that are not below that of all windows are left out.
        together: how many maps `look_ahead` measures in one forward.
        fitted: gives a plan the fits of its stand-ins.

    Raises:
        InputError: a loss is unknown, or ``lm_eval`` is one and there are no ``tasks``.
    """

    def __init__(
        self,
        model: nn.Module,
        evaluator: Evaluator,
        *,
        fitness: Mapping[str, float],
        tasks: TaskScorer | None = None,
        screen_windows: Sequence[int] = (),
        together: int = 1,
        fitted: Callable[[KVPlan], FittedPlan] = FittedPlan.of,
    ) -> None:
        parts = {name: find_fitness(name) for name in fitness}
        if "lm_eval" in fitness and tasks is None:
            raise InputError(
                "scoring.fitness=lm_eval needs tasks: name some in scoring.search.tasks"
            )
        self._model, self._evaluator, self._tasks = model, evaluator, tasks
        self._fitness = fitness
        self.screens = [count for count in screen_windows if count < evaluator.num_windows]
        self._ahead: dict[KVPlan, CandidateScores] = {}
        self._together = BatchSize(together, "scoring.maps_per_forward")
        self._fitted = fitted
        # Tasks cost too much for the first stages. If nothing else counts, KL stands for them.
        cheap = [(w, parts[n].loss) for n, w in fitness.items() if parts[n].loss is not None]
        self._cheap = cheap or [(1.0, FITNESSES["kl"].loss)]
        self.reference_score = -sum(w * parts[n].reference for n, w in fitness.items())
        self._full = evaluator.full_scores
        self.full_tasks = tasks.score(evaluator.reset) if tasks is not None else {}

    def look_ahead(self, maps: Sequence[KVPlan]) -> None:
        """Measure the first stage of all ``maps`` in one forward, before each of them is scored.

        If memory runs out, it is one of fewer maps, from then on; the last way is each map alone.
        """
        if self.screens:
            self._ahead = self._together.run(
                partial(self._measure_ahead, maps), self._evaluator.reset
            )

    def _measure_ahead(
        self, maps: Sequence[KVPlan], together: int
    ) -> dict[KVPlan, CandidateScores]:
        first = slice(self.screens[0])
        found: dict[KVPlan, CandidateScores] = {}
        for begin in range(0, len(maps), together):
            some = maps[begin : begin + together]
            if len(some) > 1:
                try:
                    measured = self._evaluator.score_together(
                        list(map(self._fitted, some)), windows=first
                    )
                except NotFiniteError:  # which of them it is shows when each is scored alone
                    continue
                found.update(zip(some, measured, strict=True))
        return found

    def __call__(self, plan: KVPlan, bar: Bar) -> Outcome:
        """Score one map, which has to pass ``bar`` in the first stages (`execution.base.Score`)."""
        fitted = self._fitted(plan)
        scores: dict[str, float] = {}
        measured = self._ahead.pop(plan, CandidateScores(()))
        for windows in self.screens:
            seen = len(measured.cosines)
            if seen < windows:
                measured += self._evaluator.score(fitted, windows=slice(seen, windows))
            name = screen(windows)
            scores[name] = self._loss(measured)
            reason = bar.refuses(name, scores[name])
            if reason:
                return Outcome(scores, "screened_out", stage(name), reason=reason)
        more = slice(len(measured.cosines), None)
        measured += self._evaluator.score(fitted, windows=more)
        scores |= {
            FIT: self._loss(measured),
            **measured.named(),
            KL_VARIANCE: variance(measured.kls) if len(measured.kls) > 1 else 0.0,
        }
        score, reached = -scores[FIT], "fit"
        on_front = bar.score is None or bar.score < score
        if self._tasks is not None and ("lm_eval" in self._fitness or on_front):
            with apply_plan(self._model, fitted):
                on_tasks = self._tasks.score(self._evaluator.reset)
            scores |= on_tasks
            reached = "tasks"
            if "lm_eval" in self._fitness:
                lost = 1 - self._mean_retained(on_tasks)
                cheap = 0.0 if self._fitness.keys() == {"lm_eval"} else scores[FIT]
                score = -(self._fitness["lm_eval"] * lost + cheap)
        singly = [slice(index, index + 1) for index in range(len(measured.cosines))]
        window_losses = tuple(self._loss(measured[one], one) for one in singly)
        return Outcome(scores, "complete", reached, score, window_losses=window_losses)

    def _mean_retained(self, scores: Mapping[str, float]) -> float:
        """The mean over the tasks of what each retains in its first metric; 1 for the full cache.

        Raises:
            InputError: the full cache scores 0 on a task, or fails it (`retained`).
        """
        assert self._tasks is not None
        first: dict[str, float] = {}
        tasks = self._tasks
        shares = retained(scores, self.full_tasks, tasks.directions, tasks.pass_marks)
        for name, share in shares.items():
            first.setdefault(ScoreName.parse(name).subject, share)
        for task in self._tasks.tasks:
            if task not in first:
                raise InputError(
                    f"search task {task} has no score to compare (the full cache fails it): "
                    "raise scoring.search.limit or choose another task"
                )
        return fmean(first[task] for task in self._tasks.tasks)

    def _loss(self, measured: CandidateScores, windows: slice | None = None) -> float:
        """The loss of scores that were measured on ``windows``; by default on the first ones."""
        full = self._full[windows or slice(len(measured.cosines))]
        parts = (weight * loss(measured, full) for weight, loss in self._cheap if loss)
        return finite("the loss of the map", sum(parts))


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far the stage ``cheap`` orders maps as the next stage, ``dear``, does.

    ``kendall_tau`` is Kendall's τ over the maps that have a loss in both stages; ``maps`` is their
    number. It is None for fewer than three. Nothing is known of maps that the cheap stage stopped.
    """

    cheap: str
    dear: str
    maps: int
    kendall_tau: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def agreements(results: Sequence[TrialResult], fitness: Mapping[str, float]) -> list[Agreement]:
    """Compare each stage with the next.

    If lm-eval is part of the fitness, the stage ``fit`` is compared with the score as well.
    """
    names = [*max((screens(r.scores) for r in results), key=len, default=[]), FIT]
    found = [
        _agreement(
            stage(cheap),
            stage(dear),
            [(r.scores.get(cheap), r.scores.get(dear)) for r in results],
        )
        for cheap, dear in pairwise(names)
    ]
    if "lm_eval" in fitness:
        ends = [(r.scores.get(FIT), None if r.score is None else -r.score) for r in results]
        found.append(_agreement("fit", "tasks", ends))
    return found


def _agreement(
    cheap: str, dear: str, losses: Sequence[tuple[float | None, float | None]]
) -> Agreement:
    known = [(a, b) for a, b in losses if a is not None and b is not None]
    tau = kendall(*zip(*known, strict=True)) if len(known) > 2 else None
    return Agreement(cheap, dear, len(known), tau)
