"""What the coordinator asks of the next plan, from the results so far.

A result costs the same work however many came before it, because a study may have many thousands.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from kvsharer_exp.search.front import is_comparable, kv_of, score_of
from kvsharer_exp.search.outcome import Bar, screen
from kvsharer_exp.values.trial import TrialResult

# Until so many maps are complete, nothing is known of how maps differ from window to window.
_TAUGHT, _FIRST_MARGIN, _LATEST = 10, 0.25, 200
_TINY = 1e-12  # a mean loss counts as at least this, so that none divides by 0


class Bars:
    """Makes the `Bar` of a plan from the results that were added.

    Args:
        screen_windows: how many windows each ``screen`` stage has seen.
        margin: by how much a plan may exceed the best loss; None: it is learned
            (`learned_margin`).
    """

    def __init__(
        self,
        screen_windows: Sequence[int] = (),
        margin: float | None = None,
        results: Iterable[TrialResult] = (),
    ) -> None:
        self._screens, self._margin = tuple(screen_windows), margin
        self._front: list[TrialResult] = []  # least KV first, so its scores rise
        self._latest: deque[tuple[float, ...]] = deque(maxlen=_LATEST)
        self._margins: dict[str, float] | None = None
        for result in results:
            self.add(result)

    def add(self, result: TrialResult) -> None:
        """Take in one more result."""
        if result.window_losses:
            self._latest.append(result.window_losses)
            self._margins = None
        if not is_comparable(result):
            return
        best = self._best(kv_of(result))
        if best is not None and score_of(best) >= score_of(result):
            return
        begin = end = bisect_left(self._front, kv_of(result), key=kv_of)
        while end < len(self._front) and score_of(self._front[end]) <= score_of(result):
            end += 1
        self._front[begin:end] = [result]

    def of(self, kv_fraction: float) -> Bar:
        """What a plan that keeps ``kv_fraction`` of the KV has to beat."""
        best = self._best(kv_fraction)
        if best is None:
            return Bar()
        names = map(screen, self._screens)
        losses = {name: best.scores[name] for name in names if name in best.scores}
        return Bar(losses, self.margins, best.score)

    @property
    def margins(self) -> dict[str, float]:
        """The margin of each ``screen`` stage after the results so far, by the name of its loss."""
        if self._margins is None:
            self._margins = {screen(windows): self._margin_of(windows) for windows in self._screens}
        return self._margins

    def _margin_of(self, windows: int) -> float:
        return learned_margin(self._latest, windows) if self._margin is None else self._margin

    def _best(self, kv_fraction: float) -> TrialResult | None:
        """The best of the results that keep at most ``kv_fraction``."""
        fitting = bisect_right(self._front, kv_fraction, key=kv_of)
        return self._front[fitting - 1] if fitting else None


def learned_margin(window_losses: Iterable[Sequence[float]], windows: int) -> float:
    """Learn how much worse a map may be on the first ``windows`` and still be the better one.

    ``window_losses``: those of the latest complete maps, by map and window.

    Maps of nearly the same loss compete. Their relative difference varies from window to window, so
    its mean over the first windows misses its mean over all windows by some standard error. The
    margin is three times this standard error. It is that wide because among hundreds of maps the
    best may be one that looks bad on the first windows.

    The maps are sorted by loss, and each is compared with its neighbour. The median over these
    pairs is taken, because a few odd maps differ far more. Until 10 maps are complete, the margin
    is 0.25.
    """
    known = list(window_losses)
    if len(known) < _TAUGHT:
        return _FIRST_MARGIN
    losses = np.array(sorted(known, key=sum))  # (maps, windows)
    level = (losses[1:] + losses[:-1]).mean(1, keepdims=True) / 2
    relative = np.diff(losses, axis=0) / np.maximum(level, _TINY)
    spread = np.median(relative.std(1, ddof=1))
    return float(3 * spread * math.sqrt(1 / windows - 1 / losses.shape[1]))
