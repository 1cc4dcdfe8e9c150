"""One candidate through the scoring stages, cheap ones first.

``screen``: a few calibration windows; a map beaten there beyond a margin by one that is no larger
stops here. ``fit``: all calibration windows. ``tasks``: lm-eval on the search tasks, for maps that
are still on the front (for every map when lm-eval is the fitness). Staged selection after
EvoPress, https://arxiv.org/abs/2410.14649.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import nn

from kvsharer_exp.errors import InputError
from kvsharer_exp.evaluator import Evaluator
from kvsharer_exp.records import CandidateScores, Footprint, Status, TrialResult
from kvsharer_exp.scoring import TaskScorer, retained
from kvsharer_exp.sharing.runtime import share_kv
from kvsharer_exp.sharing_map import SharingMap

FITNESSES = ("kl", "cosine", "perplexity", "lm_eval")

# Where the hypervolume is measured from: all KV kept, and a score no useful map falls below
# (2 nats of KL or of loss, no similarity at all, nothing retained).
SCORE_REFERENCE = {"kl": -2.0, "perplexity": -2.0, "cosine": -1.0, "lm_eval": 0.0}

SCREEN = "screen/loss"


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
        fitness: ``kl`` (score = -KL, nats), ``perplexity`` (score = -increase of the loss, nats),
            ``cosine`` (score = cosine - 1) or ``lm_eval`` (score = mean retained, 1 = full).
        screen_batches: batches of calibration windows in the first stage; 0 leaves it out.
        margin: a map is screened out when its loss exceeds (1 + margin) × that of a complete
            map with no more KV, on the same windows.
    """

    def __init__(
        self,
        model: nn.Module,
        evaluator: Evaluator,
        *,
        fitness: str = "kl",
        tasks: TaskScorer | None = None,
        screen_batches: int = 1,
        margin: float = 0.15,
    ) -> None:
        if fitness not in FITNESSES:
            raise InputError(
                f"scoring.fitness={fitness} is unknown: choose one of {', '.join(FITNESSES)}"
            )
        if fitness == "lm_eval" and tasks is None:
            raise InputError(
                "scoring.fitness=lm_eval needs tasks: name some in scoring.search.tasks"
            )
        self._model, self._evaluator, self._tasks = model, evaluator, tasks
        self._fitness, self._screen_batches, self._margin = fitness, screen_batches, margin
        self._loss = _losses(evaluator)["kl" if fitness == "lm_eval" else fitness]
        self.full_tasks = tasks.score() if tasks is not None else {}

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
            if limit is not None and scores[SCREEN] > (1 + self._margin) * limit:
                reason = f"{scores[SCREEN]:.3g} on the first windows, {limit:.3g} with no more KV"
                return Outcome(scores, "screened_out", "screen", reason=reason)
        measured += self._evaluator.score(sharing_map, batches=slice(stop, None))
        scores |= {
            "cosine": measured.cosine,
            "kl": measured.kl,
            "perplexity/calibration": measured.perplexity,
        }
        score = -self._loss(measured)
        stage = "fit"
        on_front = all(rival.score is None or rival.score < score for rival in rivals)
        if self._tasks is not None and (self._fitness == "lm_eval" or on_front):
            with share_kv(self._model, sharing_map):
                shared = self._tasks.score()
            scores |= shared
            stage = "tasks"
            if self._fitness == "lm_eval":
                score = _mean_retained(shared, self.full_tasks, list(self._tasks.tasks))
        return Outcome(scores, "complete", stage, score)


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
