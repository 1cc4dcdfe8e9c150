"""Pairs of layers, and the ranking that orders them.

`rank` makes the ranking; the greedy strategy, the seeds and the search spaces start from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsharer_exp.values.record import Record


@dataclass(frozen=True, slots=True)
class LayerPair(Record):
    """Two layers: ``target``, nearer the output, could read ``source``, nearer the input.

    ``distance`` says how unlike they are, by the measure of the ranking.
    """

    target: int
    source: int
    distance: float


@dataclass(frozen=True, slots=True)
class DissimilarityRanking(Record):
    """Every pair of layers that may share, most dissimilar first.

    ``distance`` is the name of the measure. Two layers that differ in KV shape, or of which one has
    sliding and the other full attention, make no pair.
    """

    model_id: str
    distance: str
    num_layers: int
    pairs: tuple[LayerPair, ...]
