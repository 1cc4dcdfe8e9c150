"""What scoring a plan takes and gives: the names of its losses, the bar to pass, and the outcome.

`StagedScorer` makes an `Outcome` of a plan and a `Bar`, in this process or in a worker. The
coordinator makes the bar of what it knows (`bars`). Both are JSON on their way to a worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvsharer_exp.values.record import Record
from kvsharer_exp.values.trial import Status

FIT = "fit/loss"
"""The name of the loss on all scoring windows."""
KL_VARIANCE = "kl/variance"
"""The name of the variance of a complete map's KL over the scoring windows.

A study begun before this was kept lacks it.
"""


def screen(windows: int) -> str:
    """The name of the loss on the first ``windows`` scoring windows."""
    return f"screen/{windows}/loss"


def screens(scores: Mapping[str, float]) -> list[str]:
    """The names of the losses of ``screen`` stages in ``scores``, cheapest first."""
    names = [name for name in scores if name.startswith("screen/")]
    return sorted(names, key=lambda name: int(name.split("/")[1]))


def stage(loss: str) -> str:
    """The name of the stage whose loss is called ``loss``."""
    return loss.removesuffix("/loss")


@dataclass(frozen=True, slots=True)
class Bar(Record):
    """What a plan has to beat: the best plan known that keeps no more KV.

    ``losses`` are that plan's, by the name of each ``screen`` stage, and ``score`` is its score. A
    plan is screened out when its loss exceeds (1 + margin) × the loss of the bar. Nothing is
    screened out by an empty bar.
    """

    losses: Mapping[str, float] = field(default_factory=dict)
    margins: Mapping[str, float] = field(default_factory=dict)
    score: float | None = None

    def refuses(self, name: str, loss: float) -> str:
        """Why this ``loss`` in the stage ``name`` screens a plan out; empty if it does not."""
        best = self.losses.get(name)
        if best is None or loss <= (1 + self.margins[name]) * best:
            return ""
        windows = name.split("/")[1]
        return (
            f"{loss:.3g} on the first {windows} windows, the best map with no more KV {best:.3g} "
            f"(margin {self.margins[name]:.2g})"
        )


@dataclass(frozen=True, slots=True)
class Outcome(Record):
    """What the stages measured of one plan.

    ``score`` is None unless ``status`` is ``complete``. The other fields are those of
    `TrialResult`.
    """

    scores: Mapping[str, float]
    status: Status
    stage_reached: str
    score: float | None = None
    reason: str = ""
    window_losses: tuple[float, ...] = ()
