"""The action ``drop``: attention adds nothing.

Attention drop, https://arxiv.org/abs/2406.15786.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsharer_exp.values.actions.base import Action


@dataclass(frozen=True, slots=True)
class Drop(Action):
    """The text is ``x``. The layer keeps no KV and reads none."""

    name: ClassVar[str] = "drop"
    runner: ClassVar[str] = "kvsharer_exp.model.actions.drop:DropRunner"

    @classmethod
    def read(cls, text: str, layer: int) -> Drop | None:
        return cls() if text == "x" else None

    def text(self, layer: int) -> str:
        return "x"
