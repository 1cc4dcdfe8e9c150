"""The paper's greedy strategy: walk the ranking, keep each pair that passes the cosine test.

`arms.Walker` runs it for the commands ``search`` and ``ablate`` and for the seeds of a ``sweep``;
the search space ``greedy_knobs`` runs it with other settings.

A layer becomes a target at most once. A source may become a target later (chains are resolved). One
walk serves every compression ratio: the map of a smaller ratio is the one that the walk had when it
reached that many targets.

KVSharer §3.2, https://arxiv.org/abs/2410.18517.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from statistics import stdev

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.finite import NotFiniteError
from kvsharer_exp.values.greedy import GreedyResult, GreedyStep
from kvsharer_exp.values.intervals import t_quantile
from kvsharer_exp.values.ranking import DissimilarityRanking, LayerPair
from kvsharer_exp.values.scores import Accept, CandidateScores
from kvsharer_exp.values.sharing_map import SharingMap

# The confidence of a decision on part of the windows: at most one walk in 200 over all 435 pairs of
# 30 layers decides a pair otherwise than all windows would.
_CERTAIN = 1 - 1e-5
CUTS = (6, 10)
"""Numbers of windows after which a test is worth a look; the ``cuts`` of `greedy`'s `Evaluator`."""

ORDERS = ("dissimilar", "similar", "random")

Advance = Callable[[SharingMap, Accept], tuple[CandidateScores, bool]]
"""The type of `Evaluator.advance`: score a map by cosine, and move on to it when it is accepted."""


def num_targets(compression: float, num_layers: int) -> int:
    """The number of targets at a ratio: round(compression x num_layers), halves rounded up.

    Raises:
        InputError: the number is zero or all layers.
    """
    count = int(compression * num_layers + 0.5)
    if not 0 < count < num_layers:
        raise InputError(
            f"compression {compression:g} asks for {count} of {num_layers} layers: "
            f"give a ratio between {1 / num_layers:.3f} and {(num_layers - 1) / num_layers:.3f}"
        )
    return count


def ordered_pairs(
    ranking: DissimilarityRanking, order: str, seed: int = 0
) -> tuple[LayerPair, ...]:
    """The ranking's pairs: most ``dissimilar`` first, most ``similar`` first, or ``random``.

    Raises:
        InputError: there is no such order.
    """
    if order == "dissimilar":
        return ranking.pairs
    if order == "similar":
        return ranking.pairs[::-1]
    if order == "random":
        pairs = list(ranking.pairs)
        random.Random(seed).shuffle(pairs)
        return tuple(pairs)
    raise InputError(f"search.order={order} is unknown: choose one of {', '.join(ORDERS)}")


def greedy(
    pairs: Sequence[LayerPair],
    num_layers: int,
    compressions: Sequence[float],
    *,
    advance: Advance | None,
    threshold: float = 0.5,
    all_windows: bool = False,
    max_candidates: int | None = None,
    on_step: Callable[[GreedyStep, int], None] | None = None,
) -> list[GreedyResult]:
    """Find the greedy map at each of ``compressions``; the results are in that order.

    Args:
        advance: scores a candidate; None leaves the acceptance test out (every pair passes).
        threshold: T in [-1, 1]; a candidate is accepted when its cosine `is_above` T.
        all_windows: score every candidate on all windows, not only until its test is decided.
        max_candidates: give up after that many pairs; None tries all, as the paper does.
        on_step: called after every pair tried, with the step and the number of targets so far.

    Raises:
        InputError: a ratio asks for zero or all layers.
    """
    wanted = sorted({num_targets(ratio, num_layers) for ratio in compressions})
    started = time.perf_counter()

    def accept(scores: CandidateScores, left: int) -> bool | None:
        return None if left and all_windows else is_above(threshold, scores, left)

    sharing_map = SharingMap.identity(num_layers)
    trace: list[GreedyStep] = []
    reached: dict[int, tuple[SharingMap, int, float]] = {}
    for pair in pairs:
        if pair.target in sharing_map.targets:
            continue
        candidate = sharing_map.share(pair.target, pair.source)
        cosine, accepted, windows = None, True, 0
        if advance is not None:
            try:
                scores, accepted = advance(candidate, accept)
                cosine, windows = scores.cosine, len(scores.cosines)
            except NotFiniteError:  # the map overflows in this dtype: it cannot pass
                accepted = False
        trace.append(GreedyStep(pair.target, pair.source, pair.distance, cosine, accepted, windows))
        if accepted:
            sharing_map = candidate
            reached[len(candidate.targets)] = (
                candidate,
                len(trace),
                time.perf_counter() - started,
            )
        if on_step is not None:
            on_step(trace[-1], len(sharing_map.targets))
        if len(sharing_map.targets) == wanted[-1] or len(trace) == max_candidates:
            break
    end = (sharing_map, len(trace), time.perf_counter() - started)
    results = []
    for ratio in compressions:
        requested = num_targets(ratio, num_layers)
        found, tried, seconds = reached.get(requested, end)
        results.append(
            GreedyResult(
                compression=ratio,
                requested=requested,
                found=len(found.targets),
                kv_source_layers=found.kv_source_layers,
                candidates=tried,
                seconds=seconds,
                trace=tuple(trace[:tried]),
            )
        )
    return results


def is_above(threshold: float, scores: CandidateScores, left: int) -> bool | None:
    """Whether the mean cosine on all windows is above ``threshold``; ``left`` of them are unseen.

    The answer is None while it is open: the mean of the seen windows is nearer to the threshold
    than Student's t allows at one error in 100,000. When all windows are seen, this is the paper's
    test.
    """
    cosines = scores.cosines
    seen = len(cosines)
    if left:
        if seen < 2:
            return None
        error = stdev(cosines) * math.sqrt(1 / seen - 1 / (seen + left))
        if abs(scores.cosine - threshold) <= t_quantile(_CERTAIN, seen - 1) * error:
            return None
    return scores.cosine > threshold


def trailing_layers(pairs: Sequence[LayerPair], num_layers: int, count: int) -> SharingMap:
    """The last ``count`` layers read the nearest earlier owner that they may read."""
    return _nearest(pairs, num_layers, range(num_layers - count, num_layers))


def adjacent_pairs(pairs: Sequence[LayerPair], num_layers: int, count: int) -> SharingMap:
    """Every second layer, from the output down, reads the layer before it (like CLA).

    If ``count`` asks for more targets, the other layers follow, from the output down.
    """
    second = list(range(num_layers - 1, 0, -2))
    rest = [layer for layer in range(num_layers - 1, 0, -1) if layer not in second]
    return _nearest(pairs, num_layers, sorted((second + rest)[:count]))


def _nearest(pairs: Sequence[LayerPair], num_layers: int, targets: Sequence[int]) -> SharingMap:
    """Each target reads the nearest earlier layer that it may read; chains end at an owner.

    A layer with no earlier layer of its kind stays an owner.
    """
    sources: dict[int, list[int]] = {}
    for pair in pairs:
        sources.setdefault(pair.target, []).append(pair.source)
    sharing_map = SharingMap.identity(num_layers)
    for target in targets:
        if target in sources:
            sharing_map = sharing_map.share(target, max(sources[target]))
    return sharing_map
