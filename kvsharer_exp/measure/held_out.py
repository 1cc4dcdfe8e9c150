"""Score maps on what the search never saw: perplexity of the held-out text, and the report tasks.

The commands ``evaluate`` and ``export``, and ``sweep`` at its end, score their maps here. Each map
is scored on the same windows and items as the full cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvsharer_exp.measure.batch_size import BatchSize
from kvsharer_exp.measure.perplexity import perplexity_of, window_losses
from kvsharer_exp.measure.score_interval import Items, score_intervals, share_intervals
from kvsharer_exp.measure.scoring import TaskScorer
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.sharing.runtime import apply_plan
from kvsharer_exp.values.intervals import CONFIDENCE, Interval
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.score_names import HELD_OUT_PERPLEXITY, Directions
from kvsharer_exp.values.scores import CandidateScores
from kvsharer_exp.values.sharing_map import SharingMap


@dataclass(frozen=True, slots=True)
class HeldOutScores:
    """The scores of one map by name, and their intervals over windows and items.

    ``items`` holds the values behind each score; behind a perplexity these are log-likelihoods.
    """

    scores: Mapping[str, float]
    intervals: Mapping[str, Interval]
    items: Items

    @property
    def ends(self) -> dict[str, list[float]]:
        """The intervals as JSON values, [low, high] by score name."""
        return {name: [inside.low, inside.high] for name, inside in self.intervals.items()}

    def beside(
        self, full: HeldOutScores, shares: Mapping[str, float], directions: Directions | None = None
    ) -> HeldOutScores:
        """These scores with the intervals of what they retain (``shares``) of those of ``full``."""
        more = share_intervals(shares, self.items, full.items, directions, confidence=CONFIDENCE)
        return replace(self, intervals={**self.intervals, **more})

    def behind(self, searched: CandidateScores, *, seed: int = 0) -> HeldOutScores:
        """These scores behind those on the scoring windows, with their intervals."""
        scores, items = searched.named(), searched.items
        intervals = score_intervals(scores, items, {}, confidence=CONFIDENCE, seed=seed)
        return HeldOutScores(
            {**scores, **self.scores}, {**intervals, **self.intervals}, {**items, **self.items}
        )


def score_tasks(tasks: TaskScorer, *, seed: int = 0) -> HeldOutScores:
    """Score the model on ``tasks`` as it is now, with 95 % intervals.

    Raises:
        NotFiniteError: a score is not a finite number.
    """
    scores, items = tasks.score(), tasks.item_scores
    errors = tasks.stderr()
    intervals = score_intervals(scores, items, errors, confidence=CONFIDENCE, seed=seed)
    return HeldOutScores(scores, intervals, items)


class HeldOutScorer:
    """Scores maps on held-out text and tasks.

    Args:
        windows: token ids (num_windows, window_tokens) of text that the search never saw.
        tasks: scores the report tasks; None if there are none.
        batch_size: how many windows go through the model at once; fewer after memory has run out.
        prompt: how many first tokens of each window are a prompt, see `window_losses`.
        seed: the seed of the bootstrap.
    """

    def __init__(
        self,
        model: Any,
        windows: torch.Tensor,
        tasks: TaskScorer | None,
        *,
        batch_size: BatchSize | int,
        prompt: int | None = None,
        seed: int = 0,
    ) -> None:
        self._model, self._windows, self._tasks = model, windows, tasks
        self._batch_size, self._prompt, self._seed = BatchSize.of(batch_size), prompt, seed

    def score(self, plan: FittedPlan | KVPlan | SharingMap) -> HeldOutScores:
        """Perplexity and the tasks' scores under ``plan``, with 95 % intervals.

        Raises:
            RuntimeError: a score is not a finite number.
        """
        fitted = FittedPlan.of(plan)
        with apply_plan(self._model, fitted, prompt=self._prompt):
            losses = self._batch_size.run(
                lambda size: window_losses(self._model, self._windows, size, self._prompt)
            )
        scores = {HELD_OUT_PERPLEXITY: perplexity_of(losses)}
        items = {HELD_OUT_PERPLEXITY: [-loss for loss in losses]}
        intervals = score_intervals(scores, items, {}, confidence=CONFIDENCE, seed=self._seed)
        if self._tasks is None:
            return HeldOutScores(scores, intervals, items)
        with apply_plan(self._model, fitted):
            found = score_tasks(self._tasks, seed=self._seed)
        return HeldOutScores(
            {**scores, **found.scores}, {**intervals, **found.intervals}, {**items, **found.items}
        )
