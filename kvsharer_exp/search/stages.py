"""One candidate through the scoring stages, cheap ones first.

``screen/<n>``: the first n scoring windows; a map beaten there beyond a margin by one that is no
larger stops here. ``fit``: all of them. ``tasks``: lm-eval on the search tasks, for maps that
are still on the front (for every map when lm-eval is part of the fitness). Staged selection after
EvoPress, https://arxiv.org/abs/2410.14649.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean, variance
from typing import Any

import numpy as np
import torch
from torch import nn

from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.scoring import TaskScorer
from kvsharer_exp.model.sharing.runtime import share_kv
from kvsharer_exp.search.fitness import FITNESSES, find_fitness
from kvsharer_exp.search.front import best_within
from kvsharer_exp.values.correlation import kendall
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.score_names import ScoreName, retained
from kvsharer_exp.values.scores import CandidateScores
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import Status, TrialResult

FIT = "fit/loss"
KL_VARIANCE = "kl/variance"
"""Over the scoring windows of a complete map; scores of a study begun before this lack it."""
# Before so many maps are complete nothing is known of how they differ over windows.
_TAUGHT, _FIRST_MARGIN = 10, 0.25
_TINY = 1e-12  # a loss that is none


def screen(windows: int) -> str:
    """The name of the loss on the first ``windows`` scoring windows."""
    return f"screen/{windows}/loss"


def screens(scores: Mapping[str, float]) -> list[str]:
    """Names of the losses that ``scores`` hold of stages before the last, cheapest first."""
    names = [name for name in scores if name.startswith("screen/")]
    return sorted(names, key=lambda name: int(name.split("/")[1]))


def _stage(loss: str) -> str:
    return loss.removesuffix("/loss")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the stages measured of one map; ``score`` is None unless ``status`` is complete."""

    scores: Mapping[str, float]
    status: Status
    stage_reached: str
    score: float | None = None
    reason: str = ""
    window_losses: tuple[float, ...] = ()


class StagedScorer:
    """Scores maps in stages against the results so far.

    Args:
        fitness: what the score is minus the loss of, with weights: ``kl`` (nats), ``perplexity``
            (increase of the loss, nats), ``cosine`` (1 - cosine), ``lm_eval`` (1 - mean retained).
            ``reference_score`` is that of the losses' references.
        screen_windows: how many of the evaluator's windows the stages before the last have seen;
            those that are not fewer than all are left out.
        margin: a map is screened out when its loss exceeds (1 + margin) × that of the best map
            with no more KV, on the same windows. None: learned, see `learned_margin`.
    """

    def __init__(
        self,
        model: nn.Module,
        evaluator: Evaluator,
        *,
        fitness: Mapping[str, float],
        tasks: TaskScorer | None = None,
        screen_windows: Sequence[int] = (),
        margin: float | None = None,
    ) -> None:
        parts = {name: find_fitness(name) for name in fitness}
        if "lm_eval" in fitness and tasks is None:
            raise InputError(
                "scoring.fitness=lm_eval needs tasks: name some in scoring.search.tasks"
            )
        self._model, self._evaluator, self._tasks = model, evaluator, tasks
        self._fitness, self._margin = fitness, margin
        self._screens = [count for count in screen_windows if count < evaluator.num_windows]
        self._ahead: dict[SharingMap, CandidateScores] = {}
        # Tasks are too dear for the first stages: KL stands for them.
        cheap = [(w, parts[n].loss) for n, w in fitness.items() if parts[n].loss is not None]
        self._cheap = cheap or [(1.0, FITNESSES["kl"].loss)]
        self.reference_score = -sum(w * parts[n].reference for n, w in fitness.items())
        self.full_tasks = tasks.score() if tasks is not None else {}

    def look_ahead(self, maps: Sequence[SharingMap]) -> None:
        """Measure the first stage of all ``maps`` in one forward, for when each is scored.

        Raises:
            InputError: they need more memory than the device has.
        """
        if not self._screens:
            return
        try:
            measured = self._evaluator.score_together(maps, windows=slice(self._screens[0]))
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{len(maps)} maps in one forward need more memory than there is: "
                "lower scoring.maps_per_forward"
            ) from error
        self._ahead = dict(zip(maps, measured, strict=True))

    def __call__(
        self, sharing_map: SharingMap, size: Footprint, results: Sequence[TrialResult]
    ) -> Outcome:
        """Score one map, knowing its footprint and the results so far (`study.Score`)."""
        best = best_within(results, size.kv_fraction)
        scores: dict[str, float] = {}
        measured = self._ahead.pop(sharing_map, CandidateScores(()))
        for windows in self._screens:
            seen = len(measured.cosines)
            if seen < windows:
                measured += self._evaluator.score(sharing_map, windows=slice(seen, windows))
            name = screen(windows)
            scores[name] = self._loss(measured)
            margin = self._margin_of(windows, results)
            if best is not None and scores[name] > (1 + margin) * best.scores[name]:
                reason = (
                    f"{scores[name]:.3g} on the first {windows} windows, the best map with no more "
                    f"KV {best.scores[name]:.3g} (margin {margin:.2g})"
                )
                return Outcome(scores, "screened_out", _stage(name), reason=reason)
        more = slice(len(measured.cosines), None)
        measured += self._evaluator.score(sharing_map, windows=more)
        scores |= {
            FIT: self._loss(measured),
            **measured.named(),
            KL_VARIANCE: variance(measured.kls) if len(measured.kls) > 1 else 0.0,
        }
        score, stage = -scores[FIT], "fit"
        on_front = best is None or (best.score or 0.0) < score
        if self._tasks is not None and ("lm_eval" in self._fitness or on_front):
            with share_kv(self._model, sharing_map):
                on_tasks = self._tasks.score()
            scores |= on_tasks
            stage = "tasks"
            if "lm_eval" in self._fitness:
                lost = 1 - _mean_retained(on_tasks, self.full_tasks, list(self._tasks.tasks))
                cheap = 0.0 if self._fitness.keys() == {"lm_eval"} else scores[FIT]
                score = -(self._fitness["lm_eval"] * lost + cheap)
        singly = [slice(index, index + 1) for index in range(len(measured.cosines))]
        window_losses = tuple(self._loss(measured[one], one) for one in singly)
        return Outcome(scores, "complete", stage, score, window_losses=window_losses)

    def margins(self, results: Sequence[TrialResult]) -> dict[str, float]:
        """By stage, the margin after these ``results``."""
        return {screen(windows): self._margin_of(windows, results) for windows in self._screens}

    def _margin_of(self, windows: int, results: Sequence[TrialResult]) -> float:
        return learned_margin(results, windows) if self._margin is None else self._margin

    def _loss(self, measured: CandidateScores, windows: slice | None = None) -> float:
        """On ``windows``; the first ones by default."""
        full = self._evaluator.full_scores[windows or slice(len(measured.cosines))]
        return sum(weight * loss(measured, full) for weight, loss in self._cheap if loss)


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
    """Each stage against the next, and, where tasks are part of the fitness, fit against score."""
    names = [*max((screens(r.scores) for r in results), key=len, default=[]), FIT]
    found = [
        _agreement(
            _stage(cheap),
            _stage(dear),
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


def learned_margin(results: Sequence[TrialResult], windows: int) -> float:
    """How much worse on the first ``windows`` a map may be and yet turn out the better one.

    The relative difference between maps of like loss, which are those that compete, varies from
    window to window; its mean over the first of them misses that over all by some standard error.
    The margin, three times that, stops hardly a better one: among hundreds of maps the best may be
    one that the first windows are against. Learned from neighbours among the latest 200 complete
    maps: the median, for a few odd maps differ far more.
    """
    known = [result.window_losses for result in results if result.window_losses][-200:]
    if len(known) < _TAUGHT:
        return _FIRST_MARGIN
    losses = np.array(sorted(known, key=sum))  # (maps, windows)
    level = (losses[1:] + losses[:-1]).mean(1, keepdims=True) / 2
    relative = np.diff(losses, axis=0) / np.maximum(level, _TINY)
    spread = np.median(relative.std(1, ddof=1))
    return float(3 * spread * math.sqrt(1 / windows - 1 / losses.shape[1]))


def _mean_retained(
    scores: Mapping[str, float], full: Mapping[str, float], tasks: Sequence[str]
) -> float:
    """Mean over tasks of what is retained of each task's first metric; 1 is the full cache."""
    first: dict[str, float] = {}
    for name, share in retained(scores, full).items():
        first.setdefault(ScoreName.parse(name).subject, share)
    missing = [task for task in tasks if task not in first]
    if missing:
        raise InputError(
            f"search task {missing[0]} has no score to compare (the full cache scores 0): "
            "raise scoring.search.limit or choose another task"
        )
    return fmean(first[task] for task in tasks)
