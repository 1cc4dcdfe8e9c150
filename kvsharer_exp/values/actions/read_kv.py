"""The action ``read_kv``: keys of one layer, values of another; one of them may be the layer's own.

FusedKV found that keys and values want different sources.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.read import Read


@dataclass(frozen=True, slots=True)
class ReadKV(Action):
    """Text ``0k7v``: reads the keys of layer 0 and the values of layer 7.

    A layer that names itself stores that half, unquantised.
    """

    key_source: int
    value_source: int

    name: ClassVar[str] = "read_kv"
    runner: ClassVar[str] = "kvsharer_exp.model.actions.read_kv:ReadKVRunner"

    @classmethod
    def read(cls, text: str, layer: int) -> ReadKV | None:
        found = re.fullmatch(r"([0-9]+)k([0-9]+)v", text)
        return None if found is None else cls(int(found[1]), int(found[2]))

    def text(self, layer: int) -> str:
        return f"{self.key_source}k{self.value_source}v"

    def canonical(self, layer: int) -> Action:
        if self.key_source != self.value_source:
            return self
        return Read(self.key_source).canonical(layer)

    def keys_from(self, layer: int) -> int:
        return self.key_source

    def values_from(self, layer: int) -> int:
        return self.value_source
