"""What the paper's greedy strategy tried and found, as the function `greedy` returns it."""

from __future__ import annotations

from dataclasses import dataclass

from kvsharer_exp.values.record import Record


@dataclass(frozen=True, slots=True)
class GreedyStep(Record):
    """One pair that the greedy strategy tried.

    ``cosine`` is the mean over the ``windows`` that it took to decide. It is None when no test was
    asked for, and when the map overflowed in the model's dtype.
    """

    target: int
    source: int
    distance: float
    cosine: float | None
    accepted: bool
    windows: int = 0


@dataclass(frozen=True, slots=True)
class GreedyResult(Record):
    """What the greedy strategy found at one compression ratio.

    ``requested`` and ``found`` are numbers of shared layers; fewer may be found than requested.
    ``candidates`` counts the pairs tried. An arm that tries none has an empty ``trace``.
    """

    compression: float
    requested: int
    found: int
    kv_source_layers: tuple[int, ...]
    candidates: int
    seconds: float
    trace: tuple[GreedyStep, ...]
