"""The action ``constant``: attention adds its mean output on the calibration text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsharer_exp.values.actions.base import Action


@dataclass(frozen=True, slots=True)
class Constant(Action):
    """The text is ``c``. The layer keeps no KV and reads none."""

    name: ClassVar[str] = "constant"
    runner: ClassVar[str] = "kvsharer_exp.model.actions.constant:ConstantRunner"
    fitted: ClassVar[bool] = True

    @classmethod
    def read(cls, text: str, layer: int) -> Constant | None:
        return cls() if text == "c" else None

    def text(self, layer: int) -> str:
        return "c"
