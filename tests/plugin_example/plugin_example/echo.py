"""An action: attention adds a multiple of its own input, the same in all channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsharer_exp.extend import Action


@dataclass(frozen=True, slots=True)
class Echo(Action):
    """The text is ``e``."""

    name: ClassVar[str] = "echo"
    runner: ClassVar[str] = "plugin_example.echo_runner:EchoRunner"
    fitted: ClassVar[bool] = True

    @classmethod
    def read(cls, text: str, layer: int) -> Echo | None:
        return cls() if text == "e" else None

    def text(self, layer: int) -> str:
        return "e"
