"""The end of a sweep: decide on more text than the search had which map of each size is best.

The command ``sweep`` holds the finals after its search. A search goes by the KL on a few windows,
which varies less from window to window than the loss on the text does. Of two good maps of SmolLM2,
the standard deviations are 0.016 (KL) and 0.03 nats (loss) at 256 tokens a window. But the map of
least KL need not be the map of least perplexity. Perplexity is what counts in the end, and it takes
a hundred windows to see. So maps that the search cannot tell apart meet on windows that it never
used.

The finals are a race (Maron and Moore, *Hoeffding Races*, NeurIPS 1993). Batch after batch of
windows goes to all maps that are left. A map leaves when it is behind the best map of its KV beyond
doubt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from statistics import fmean
from typing import Any

import torch

from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.search.execution.base import PLAN_FAULTS, reason_of
from kvsharer_exp.search.front import Rung, kv_of
from kvsharer_exp.search.study_store import StudyStore
from kvsharer_exp.values.intervals import standard_error, t_interval
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.trial import TrialResult

Batch = Callable[[TrialResult], Sequence[float]]
"""Gives the losses of a map on the windows of one batch."""

Losses = Mapping[int, Sequence[float]]
"""By the number of a trial, the losses of its map on the windows so far."""

# A finalist is at most this part of the best map's loss behind the best map of its KV, and at most
# so many maps of one KV are finalists.
MARGIN, EACH = 0.1, 6
_CERTAIN = 0.95


@dataclass(frozen=True)
class Finals:
    """How finals are held.

    Args:
        cut: gives token ids (num_windows, window_tokens) that the search never used.
        evaluator: makes an evaluator of some of these windows.
        batch_size: the number of windows in a batch.
        is_over: says whether the time for the finals has passed.
        say: tells the progress.
        fitted: gives a plan the fits of its stand-ins.
        rung: says which results compete for one place; those of equal KV unless said otherwise.
    """

    cut: Callable[[], torch.Tensor]
    evaluator: Callable[[torch.Tensor], Evaluator]
    batch_size: int
    is_over: Callable[[], bool]
    say: Callable[[str], None]
    fitted: Callable[[KVPlan], FittedPlan] = FittedPlan.of
    rung: Rung = kv_of

    def hold(
        self, store: StudyStore, found: Sequence[TrialResult], front: list[TrialResult]
    ) -> tuple[list[TrialResult], dict[str, Any]]:
        """Decide on the front; returns it with what ``result.json`` says of the finals.

        The loss of a map is the increase of the loss on the text over that of the full cache, in
        nats. The study keeps the losses of every map on every batch as soon as they are measured,
        so a killed run loses those under way at most. If no map competes with those of ``front``,
        or there is no text, the front stays as it is.
        """
        maps = finalists(found, front, self.rung)
        if len(maps) == len(front):
            return front, {"windows": 0}
        windows = self.cut()
        if not len(windows):
            self.say("no finals: the calibration text has no windows but those of the search")
            return front, {"windows": 0}
        self.say(
            f"finals: {len(maps)} maps for {len(front)} places on up to {len(windows)} windows"
        )
        left = race(maps, self._batches(store, windows), self.is_over, self.rung, self.say)
        best = winners(maps, left, self.rung)
        seen = max(map(len, left.values()), default=0)
        self.say(f"finals: {len(left)} maps are left after {seen} windows")
        return best or front, {"windows": seen, "maps": _standing(maps, left, best)}

    def _batches(self, store: StudyStore, windows: torch.Tensor) -> Iterator[Batch]:
        kept = store.finals
        for begin in range(0, len(windows), self.batch_size):
            part = slice(begin, min(begin + self.batch_size, len(windows)))
            yield partial(self._losses, store, kept, self.evaluator(windows[part]), part)

    def _losses(
        self,
        store: StudyStore,
        kept: dict[str, list[float]],
        evaluator: Evaluator,
        part: slice,
        result: TrialResult,
    ) -> list[float]:
        """The losses of a map on the windows of ``part``, which are those of ``evaluator``.

        ``kept`` is what ``store`` has kept; losses that are measured are kept in both.
        """
        known = kept.setdefault(result.plan.digest, [])
        if len(known) < part.stop:  # those of an earlier run may end within the batch
            scores, full = evaluator.score(self.fitted(result.plan)), evaluator.full_scores
            known[part] = [a - b for a, b in zip(scores.nlls, full.nlls, strict=True)]
            store.keep_final(result.plan, known)
        return known[part]


def _standing(
    maps: Sequence[TrialResult], left: Losses, best: Sequence[TrialResult]
) -> list[dict[str, Any]]:
    return [
        {
            "kv_source_layers": _sources(result),
            "plan": str(result.plan),
            "digest": result.plan.digest,
            "num_shared": result.num_shared,
            "loss": fmean(left[result.number]) if left.get(result.number) else None,
            "on_front": result in best,
        }
        for result in maps
    ]


def finalists(
    results: Sequence[TrialResult], front: Sequence[TrialResult], rung: Rung = kv_of
) -> list[TrialResult]:
    """The maps of ``front``, each followed by those of the same ``rung`` that are close behind."""
    found, leaders = [], {result.number for result in front}
    for leader in front:
        best = leader.score or 0.0
        rivals = [
            result
            for result in results
            if result.score is not None
            and rung(result) == rung(leader)
            and result.number not in leaders
            and result.score >= best - MARGIN * abs(best)
        ]
        rivals.sort(key=lambda result: (-(result.score or 0.0), result.number))
        found += [leader, *rivals[: EACH - 1]]
    return list({result.number: result for result in found}.values())


def race(
    maps: Sequence[TrialResult],
    batches: Iterable[Batch],
    is_over: Callable[[], bool],
    rung: Rung = kv_of,
    say: Callable[[str], None] = lambda text: None,
) -> Losses:
    """Run the race; returns the losses of the maps that are left in the end.

    The race ends when one map of every ``rung`` is left, when there are no more ``batches``, or
    when ``is_over`` says so. A batch that not all maps have had counts for none of them. A map
    whose scoring ends in one of `PLAN_FAULTS` leaves, and ``say`` is told why.
    """
    left: Losses = {result.number: () for result in maps}
    by_number = {result.number: result for result in maps}
    for batch in batches:
        if len(left) == len({rung(by_number[number]) for number in left}):
            break
        more: dict[int, Sequence[float]] = {}
        for number, losses in left.items():
            if is_over():
                return left
            try:
                more[number] = (*losses, *batch(by_number[number]))
            except PLAN_FAULTS as error:  # nothing can be said of it on these windows
                say(f"finals: {by_number[number].plan} leaves ({reason_of(error)})")
        left = _in_doubt(more, by_number, rung)
    return left


def winners(maps: Sequence[TrialResult], losses: Losses, rung: Rung = kv_of) -> list[TrialResult]:
    """The front, most KV first: the winner of every rung that none with less KV beats.

    Of the maps of one ``rung``, the first of ``maps`` that is left wins, because the search scored
    it highest. A few windows say less than the search did, so one map beats another only if its
    mean loss is lower by more than a standard error, both within a rung and between rungs.
    """
    left = sorted((result for result in maps if losses.get(result.number)), key=rung)
    front: list[TrialResult] = []
    for _, group in groupby(left, key=rung):
        rivals = list(group)
        best = min(rivals, key=lambda result: fmean(losses[result.number]))
        if not _beats(losses[best.number], losses[rivals[0].number]):
            best = rivals[0]
        if not any(_beats(losses[less.number], losses[best.number]) for less in front):
            front.append(best)
    return front[::-1]


def _beats(some: Sequence[float], others: Sequence[float]) -> bool:
    """Whether the mean of ``some`` is lower than that of ``others`` by over a standard error."""
    ahead = _difference(others, some)
    return fmean(ahead) > (standard_error(ahead) if len(ahead) > 1 else 0.0)


def _in_doubt(losses: Losses, maps: Mapping[int, TrialResult], rung: Rung) -> Losses:
    """The losses of the maps that may still be the best of their rung.

    While there is one window only, these are all maps.
    """
    kept: dict[int, Sequence[float]] = {}
    ranked = sorted(losses, key=lambda number: (rung(maps[number]), fmean(losses[number])))
    for _, group in groupby(ranked, key=lambda number: rung(maps[number])):
        leader, *rivals = group
        kept[leader] = losses[leader]
        for number in rivals:
            behind = _difference(losses[number], losses[leader])
            if len(behind) < 2 or t_interval(behind, confidence=_CERTAIN).low <= 0:
                kept[number] = losses[number]
    return kept


def _difference(some: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(some, others, strict=True)]


def _sources(result: TrialResult) -> list[int] | None:
    sharing_map = result.sharing_map
    return None if sharing_map is None else list(sharing_map.kv_source_layers)
