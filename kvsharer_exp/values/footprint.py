"""The memory of one plan: predicted from shapes, and counted on a cache that exists.

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
    """The memory of one plan, as its shapes predict it, with ``measured`` if it was also counted.

    ``kv_bytes`` is what a cache holds of one sequence of ``context`` tokens, and
    ``kv_bytes_per_token`` its quotient. ``kv_fraction`` is the plan's share of the full cache's
    bytes, where what is not quantised counts as 16 bits. ``parameter_bytes_saved`` is the size of
    the parameters that the plan does without, less that of its stand-ins, so it may be negative.
    ``attention_flops`` are those of all attentions, or what stands in for them, for one token after
    ``context`` others: 2 for each weight, in however few bits it is held, and 2 for each number of
    each key and value that a query head reads. Results of earlier versions lack ``context``,
    ``kv_bytes`` and ``attention_flops``.
    """

    kv_bytes_per_token: float
    kv_fraction: float
    parameter_bytes_saved: int
    measured: MeasuredFootprint | None = None
    context: int = 0
    kv_bytes: int = 0
    attention_flops: int = 0
