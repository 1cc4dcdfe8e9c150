"""Pairs of layers, and the ranking that orders them."""

from __future__ import annotations

from dataclasses import dataclass

from kvsharer_exp.values.record import Record


@dataclass(frozen=True, slots=True)
class LayerPair(Record):
    """``target`` (nearer the output) could read ``source`` (nearer the input)."""

    target: int
    source: int
    distance: float


@dataclass(frozen=True, slots=True)
class DissimilarityRanking(Record):
    """Every pair of layers that may share, most dissimilar first.

    Pairs of unlike layers (KV shape, sliding against full attention) are not in it.
    """

    model_id: str
    distance: str
    num_layers: int
    pairs: tuple[LayerPair, ...]
