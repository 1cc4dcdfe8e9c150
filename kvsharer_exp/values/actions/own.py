"""The action ``own``: a layer keeps its own KV, in 16 bits or quantised."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.precision import FULL, Precision


@dataclass(frozen=True, slots=True)
class Own(Action):
    """Texts at layer 5: ``5``, ``5q4``, ``5q3g64s4``.

    ``bits``, ``group`` and ``sinks`` are those of `Precision`. All tokens are kept.

    Raises:
        InputError: see `Precision`.
    """

    bits: int = FULL
    group: int = 32
    sinks: int = 0

    name: ClassVar[str] = "own"
    runner: ClassVar[str] = "kvsharer_exp.model.actions.own:OwnRunner"

    def __post_init__(self) -> None:
        checked = self.precision
        object.__setattr__(self, "bits", checked.bits)
        object.__setattr__(self, "group", checked.group)
        object.__setattr__(self, "sinks", checked.sinks)

    @property
    def precision(self) -> Precision:
        return _precision(self.bits, self.group, self.sinks)

    @property
    def quantised(self) -> bool:
        return self.bits != FULL

    @classmethod
    def read(cls, text: str, layer: int) -> Own | None:
        found = re.fullmatch(r"(\d+)(.*)", text)
        if found is None or int(found[1]) != layer:
            return None
        precision = Precision.read(found[2])
        if precision is None:
            return None
        return cls(precision.bits, precision.group, precision.sinks)

    def text(self, layer: int) -> str:
        return f"{layer}{self.precision}"

    def keys_from(self, layer: int) -> int:
        return layer

    def values_from(self, layer: int) -> int:
        return layer


_precision = cache(Precision)
