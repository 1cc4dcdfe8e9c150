"""Acceptance against rank: does a pair's place in the ranking say whether sharing it is harmless?

The command ``ablate`` asks this in two ways. `acceptance_by_rank` counts along the greedy walks,
where a pair is tried on top of the pairs accepted before. `pairs_alone` scores every pair on its
own, where no order plays a part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.values.greedy import GreedyStep
from kvsharer_exp.values.intervals import Interval, wilson
from kvsharer_exp.values.ranking import DissimilarityRanking
from kvsharer_exp.values.sharing_map import SharingMap


@dataclass(frozen=True, slots=True)
class RankBin:
    """How many pairs of ranks ``first`` to ``last`` were accepted (rank 1 is the most dissimilar).

    ``rate`` is the share of the tried pairs that passed, with its interval; None if none was tried.
    """

    first: int
    last: int
    tried: int
    accepted: int
    rate: Interval | None


def acceptance_by_rank(
    ranking: DissimilarityRanking,
    traces: Sequence[Sequence[GreedyStep]],
    *,
    num_bins: int = 10,
    confidence: float = 0.95,
) -> list[RankBin]:
    """Count how many of the tested pairs passed, by their place in the ranking.

    A pair that was taken without the test does not count. ``confidence`` is that of the intervals.
    """
    place = {(pair.target, pair.source): i for i, pair in enumerate(ranking.pairs)}
    count = len(ranking.pairs)
    bins = min(num_bins, count)
    tried, accepted = [0] * bins, [0] * bins
    for step in (step for trace in traces for step in trace if step.cosine is not None):
        index = place[step.target, step.source] * bins // count
        tried[index] += 1
        accepted[index] += step.accepted
    return [
        RankBin(
            first=-(-i * count // bins) + 1,
            last=-(-(i + 1) * count // bins),
            tried=tried[i],
            accepted=accepted[i],
            rate=wilson(accepted[i], tried[i], confidence=confidence) if tried[i] else None,
        )
        for i in range(bins)
    ]


@dataclass(frozen=True, slots=True)
class PairScore:
    """One pair shared alone: its rank in the ranking (1 is the most dissimilar) and its cost.

    ``kl`` is in nats.
    """

    rank: int
    target: int
    source: int
    distance: float
    cosine: float
    kl: float


def pairs_alone(
    evaluator: Evaluator,
    ranking: DissimilarityRanking,
    *,
    max_pairs: int | None = None,
    on_pair: Callable[[PairScore], None] | None = None,
) -> list[PairScore]:
    """Score every pair shared on its own, in the ranking's order: does its rank say its cost?

    ``max_pairs``: score only so many pairs, evenly spread over the ranks. ``on_pair`` is called
    with each score.
    """
    count = len(ranking.pairs)
    kept = count if max_pairs is None else min(count, max_pairs)
    chosen = [i * count // kept for i in range(kept)]
    found = []
    for index in chosen:
        pair = ranking.pairs[index]
        alone = SharingMap.identity(ranking.num_layers).share(pair.target, pair.source)
        scores = evaluator.score(alone)
        found.append(
            PairScore(
                rank=index + 1,
                target=pair.target,
                source=pair.source,
                distance=pair.distance,
                cosine=scores.cosine,
                kl=scores.kl,
            )
        )
        if on_pair is not None:
            on_pair(found[-1])
    return found
