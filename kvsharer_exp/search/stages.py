"""One candidate through the scoring stages, cheap ones first.

``screen``: a few calibration windows; a map beaten there beyond a margin by one that is no larger
stops here. ``fit``: all calibration windows. ``tasks``: lm-eval on the search tasks, for maps that
are still on the front (for every map when lm-eval is part of the fitness). Staged selection after
EvoPress, https://arxiv.org/abs/2410.14649.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev, variance
from typing import Any

from torch import nn

from kvsharer_exp.errors import InputError
from kvsharer_exp.evaluator import Evaluator
from kvsharer_exp.records import CandidateScores, Footprint, Status, TrialResult
from kvsharer_exp.scoring import TaskScorer, retained
from kvsharer_exp.sharing.runtime import share_kv
from kvsharer_exp.sharing_map import SharingMap
from kvsharer_exp.statistics import kendall

# Where the hypervolume is measured from besides all KV kept: a loss no useful map exceeds (2 nats
# of KL or of loss, no similarity at all, nothing retained).
FITNESSES = {"kl": 2.0, "perplexity": 2.0, "cosine": 1.0, "lm_eval": 1.0}

SCREEN, FIT = "screen/loss", "fit/loss"
# Before so many maps passed both stages nothing is known of how far they agree.
_TAUGHT, _FIRST_MARGIN = 10, 0.25


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the stages measured of one map; ``score`` is None unless ``status`` is complete."""

    scores: Mapping[str, float]
    status: Status
    stage_reached: str
    score: float | None = None
    reason: str = ""


class StagedScorer:
    """Scores maps in stages against the results so far.

    Args:
        fitness: what the score is minus the loss of, with weights: ``kl`` (nats), ``perplexity``
            (increase of the loss, nats), ``cosine`` (1 - cosine), ``lm_eval`` (1 - mean retained).
        screen_batches: batches of calibration windows in the first stage; 0 leaves it out.
        margin: a map is screened out when its loss exceeds (1 + margin) × that of a complete
            map with no more KV, on the same windows. None: learned, see `learned_margin`.
    """

    def __init__(
        self,
        model: nn.Module,
        evaluator: Evaluator,
        *,
        fitness: Mapping[str, float],
        tasks: TaskScorer | None = None,
        screen_batches: int = 1,
        margin: float | None = None,
    ) -> None:
        unknown = sorted(fitness.keys() - FITNESSES.keys())
        if unknown or not fitness:
            raise InputError(
                f"scoring.fitness={', '.join(unknown) or 'nothing'} is unknown: "
                f"choose one of {', '.join(FITNESSES)}"
            )
        if "lm_eval" in fitness and tasks is None:
            raise InputError(
                "scoring.fitness=lm_eval needs tasks: name some in scoring.search.tasks"
            )
        self._model, self._evaluator, self._tasks = model, evaluator, tasks
        self._fitness, self._screen_batches, self._margin = fitness, screen_batches, margin
        # Tasks are too dear for the first stages: KL stands for them.
        self._cheap = {name: w for name, w in fitness.items() if name != "lm_eval"} or {"kl": 1.0}
        self._losses = _losses(evaluator)
        self.full_tasks = tasks.score() if tasks is not None else {}

    @property
    def reference_score(self) -> float:
        """Where the hypervolume of this fitness is measured from."""
        return -sum(weight * FITNESSES[name] for name, weight in self._fitness.items())

    def __call__(
        self, sharing_map: SharingMap, size: Footprint, results: Sequence[TrialResult]
    ) -> Outcome:
        """Score one map, knowing its footprint and the results so far (`study.Score`)."""
        rivals = [
            result
            for result in results
            if result.status == "complete" and result.footprint.kv_fraction <= size.kv_fraction
        ]
        scores: dict[str, float] = {}
        stop = self._screen_batches
        measured = CandidateScores(())
        if stop:
            measured = self._evaluator.score(sharing_map, batches=slice(0, stop))
            scores[SCREEN] = self._loss(measured)
            limit = min((r.scores[SCREEN] for r in rivals), default=None)
            margin = learned_margin(results) if self._margin is None else self._margin
            if limit is not None and scores[SCREEN] > (1 + margin) * limit:
                reason = (
                    f"{scores[SCREEN]:.3g} on the first windows, {limit:.3g} with no more KV "
                    f"(margin {margin:.2g})"
                )
                return Outcome(scores, "screened_out", "screen", reason=reason)
        measured += self._evaluator.score(sharing_map, batches=slice(stop, None))
        scores |= {
            FIT: self._loss(measured),
            "cosine": measured.cosine,
            "kl": measured.kl,
            "kl/variance": variance(measured.kls) if len(measured.kls) > 1 else 0.0,
            "perplexity/calibration": measured.perplexity,
        }
        score, stage = -scores[FIT], "fit"
        on_front = all(rival.score is None or rival.score < score for rival in rivals)
        if self._tasks is not None and ("lm_eval" in self._fitness or on_front):
            with share_kv(self._model, sharing_map):
                shared = self._tasks.score()
            scores |= shared
            stage = "tasks"
            if "lm_eval" in self._fitness:
                lost = 1 - _mean_retained(shared, self.full_tasks, list(self._tasks.tasks))
                cheap = 0.0 if self._fitness.keys() == {"lm_eval"} else scores[FIT]
                score = -(self._fitness["lm_eval"] * lost + cheap)
        return Outcome(scores, "complete", stage, score)

    def _loss(self, measured: CandidateScores) -> float:
        return sum(weight * self._losses[name](measured) for name, weight in self._cheap.items())


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a cheap stage orders maps as the next one does: Kendall's τ over ``maps`` maps that
    passed both (None below three); of those it stopped nothing is known."""

    cheap: str
    dear: str
    maps: int
    kendall_tau: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def agreements(results: Sequence[TrialResult], fitness: Mapping[str, float]) -> list[Agreement]:
    """Screen against fit, and, where tasks are part of the fitness, fit against the score."""
    both = [r for r in results if r.score is not None]
    found = [_agreement("screen", "fit", [(r.scores.get(SCREEN), r.scores.get(FIT)) for r in both])]
    if "lm_eval" in fitness:
        ends = [(r.scores.get(FIT), -r.score if r.score is not None else None) for r in both]
        found.append(_agreement("fit", "tasks", ends))
    return found


def _agreement(
    cheap: str, dear: str, losses: Sequence[tuple[float | None, float | None]]
) -> Agreement:
    known = [(a, b) for a, b in losses if a is not None and b is not None]
    tau = kendall(*zip(*known, strict=True)) if len(known) > 2 else None
    return Agreement(cheap, dear, len(known), tau)


def learned_margin(results: Sequence[TrialResult]) -> float:
    """How much worse on the first windows a map may be and yet turn out the better one.

    The log of fit loss over screen loss varies from map to map with some standard deviation s; two
    maps differ by √2 s. The margin lets through all but the most surprising 2 %. Of the latest 200.
    """
    known = [(r.scores.get(SCREEN), r.scores.get(FIT)) for r in results if r.score is not None]
    logs = [math.log(fit / screen) for screen, fit in known if screen and fit][-200:]
    if len(logs) < _TAUGHT:
        return _FIRST_MARGIN
    return math.exp(2 * math.sqrt(2) * stdev(logs)) - 1


def _losses(evaluator: Evaluator) -> dict[str, Callable[[CandidateScores], float]]:
    """Each fitness as a loss: 0 for the full cache, higher is worse."""

    def more_nll(scores: CandidateScores) -> float:
        full = evaluator.full_scores.nlls[: len(scores.nlls)]
        return max(0.0, (sum(scores.nlls) - sum(full)) / len(full))

    return {
        "kl": lambda scores: scores.kl,
        "cosine": lambda scores: 1 - scores.cosine,
        "perplexity": more_nll,
    }


def _mean_retained(
    shared: Mapping[str, float], full: Mapping[str, float], tasks: Sequence[str]
) -> float:
    """Mean over tasks of what is retained of each task's first metric; 1 is the full cache."""
    kept = retained(shared, full)
    first = [next((n for n in kept if n.startswith(f"lm_eval/{task}/")), None) for task in tasks]
    missing = [task for task, name in zip(tasks, first, strict=True) if name is None]
    if missing:
        raise InputError(
            f"search task {missing[0]} has no score to compare (the full cache scores 0): "
            "raise scoring.search.limit or choose another task"
        )
    return fmean(kept[name] for name in first if name is not None)
