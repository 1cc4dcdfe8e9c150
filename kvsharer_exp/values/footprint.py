"""Memory of one map: predicted from shapes, and counted on a cache that exists."""

from __future__ import annotations

from dataclasses import dataclass

from kvsharer_exp.values.record import Record


@dataclass(frozen=True, slots=True)
class MeasuredFootprint(Record):
    """What was counted on tensors that exist, beside what the shapes predict."""

    cache_bytes: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Footprint(Record):
    """Memory of one map. ``kv_fraction``: its KV bytes per token / the full cache's."""

    kv_bytes_per_token: int
    kv_fraction: float
    parameter_bytes_saved: int
    measured: MeasuredFootprint | None = None
