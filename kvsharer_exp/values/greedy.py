"""What the paper's greedy strategy tried and found."""

from __future__ import annotations

from dataclasses import dataclass

from kvsharer_exp.values.record import Record


@dataclass(frozen=True, slots=True)
class GreedyStep(Record):
    """One pair the greedy strategy tried; ``cosine`` is None when no test was asked for, else the
    mean over the ``windows`` it took to decide."""

    target: int
    source: int
    distance: float
    cosine: float | None
    accepted: bool
    windows: int = 0


@dataclass(frozen=True, slots=True)
class GreedyResult(Record):
    """The greedy strategy at one compression ratio; ``found`` may be below ``requested``."""

    compression: float
    requested: int
    found: int
    kv_source_layers: tuple[int, ...]
    candidates: int
    seconds: float
    trace: tuple[GreedyStep, ...]
