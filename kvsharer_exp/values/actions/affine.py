"""The action ``affine``: a matrix and a bias map attention's input to its output.

They are the ridge regression, in closed form. NBL, https://arxiv.org/abs/2505.21077.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsharer_exp.values.actions.base import Action


@dataclass(frozen=True, slots=True)
class Affine(Action):
    """The text is ``a``. The layer keeps no KV and reads none."""

    name: ClassVar[str] = "affine"
    runner: ClassVar[str] = "kvsharer_exp.model.actions.affine:AffineRunner"
    fitted: ClassVar[bool] = True

    @classmethod
    def read(cls, text: str, layer: int) -> Affine | None:
        return cls() if text == "a" else None

    def text(self, layer: int) -> str:
        return "a"
