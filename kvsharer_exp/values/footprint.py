"""The memory of one map: predicted from shapes, and counted on a cache that exists.

`footprint` and `measured_footprint` make these values.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsharer_exp.values.record import Record


@dataclass(frozen=True, slots=True)
class MeasuredFootprint(Record):
    """The bytes that a real cache held after a prefill of ``tokens`` tokens in all."""

    cache_bytes: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Footprint(Record):
    """The memory of one map, as its shapes predict it, with ``measured`` if it was also counted.

    ``kv_fraction`` is the map's KV bytes per token divided by those of the full cache.
    ``parameter_bytes_saved`` is the size of the key and value projections that targets drop.
    """

    kv_bytes_per_token: int
    kv_fraction: float
    parameter_bytes_saved: int
    measured: MeasuredFootprint | None = None
