"""What a search minimises: a loss by name, or several with weights (``scoring.fitness``).

`StagedScorer` computes the losses, and figures label them with `axis_label`. Another package adds a
loss by an entry point of the group ``kvsharer_exp.scorers``, which loads a `Fitness`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plugins import find_part
from kvsharer_exp.values.scores import CandidateScores


@dataclass(frozen=True, slots=True)
class Fitness:
    """A loss that a search minimises: it is 0 for the full cache, and higher is worse.

    ``loss`` takes the scores of a map and those of the full cache on the same windows. It is None
    if the loss comes from lm-eval, in the last stage. ``reference`` is a loss that no useful map
    exceeds; the hypervolume is measured from there. ``axis`` labels the loss in a figure.
    """

    reference: float
    loss: Callable[[CandidateScores, CandidateScores], float] | None
    axis: str = ""


def _more_nll(scores: CandidateScores, full: CandidateScores) -> float:
    return max(0.0, fmean(scores.nlls) - fmean(full.nlls))


GROUP = "kvsharer_exp.scorers"
"""The group of entry points by which other packages add losses."""

FITNESSES: dict[str, Fitness] = {
    "kl": Fitness(2.0, lambda scores, full: scores.kl, "KL to the full cache, nats"),
    "perplexity": Fitness(2.0, _more_nll, "increase of the loss, nats"),
    "cosine": Fitness(1.0, lambda scores, full: 1 - scores.cosine, "1 − cosine to the full cache"),
    "lm_eval": Fitness(1.0, None, "1 − mean retained of the search tasks"),
}


def axis_label(fitness: str) -> str:
    """What the axis of a figure says of ``fitness``: one of our losses, or several with weights."""
    own = FITNESSES.get(fitness)
    return own.axis if own else f"{fitness}, losses"


def find_fitness(name: str) -> Fitness:
    """The fitness ``name``, which is one of ours or another package's.

    Raises:
        InputError: there is no such fitness, or what the other package has is no `Fitness`.
    """
    found = find_part(name, FITNESSES, group=GROUP, key="scoring.fitness")
    if not isinstance(found, Fitness):
        raise InputError(f"scoring.fitness={name} is no extend.Fitness: give a name that is")
    return found
