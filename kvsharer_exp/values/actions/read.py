"""The action ``read``: a layer reads the KV of an earlier layer, as a target of a sharing map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.own import Own


@dataclass(frozen=True, slots=True)
class Read(Action):
    """Reads keys and values of the layer ``source``; the text is its number."""

    source: int

    name: ClassVar[str] = "read"
    runner: ClassVar[str] = "kvsharer_exp.model.actions.read:ReadRunner"

    @classmethod
    def read(cls, text: str, layer: int) -> Read | None:
        is_number = text.isascii() and text.isdecimal()
        return cls(int(text)) if is_number and int(text) != layer else None

    def text(self, layer: int) -> str:
        return str(self.source)

    def canonical(self, layer: int) -> Action:
        return Own() if self.source == layer else self

    def keys_from(self, layer: int) -> int:
        return self.source

    def values_from(self, layer: int) -> int:
        return self.source
