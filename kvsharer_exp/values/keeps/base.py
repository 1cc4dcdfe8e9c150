"""What every keep is: which tokens a layer that owns its KV goes on holding.

It is the second part of the action `own`, beside the `Precision`. `registry` lists the keeps. In a
model the layers of ``model/stores/`` hold the tokens.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar


class Keep:
    """Base of the keeps, which are frozen dataclasses of plain values.

    ``name`` stands for the keep in JSON. ``sinks`` is the number of first tokens that always stay,
    in 16 bits also where the layer is quantised. A ``prompted`` keep lets tokens go when the prompt
    has ended, so it means nothing where nobody says which tokens are the prompt.
    """

    __slots__ = ()

    name: ClassVar[str]
    prompted: ClassVar[bool] = False
    sinks: int

    @classmethod
    def read(cls, text: str) -> Keep | None:
        """Read the end of an owner's text; None when it is not that of this keep.

        Raises:
            InputError: it is, but a part of it breaks a rule.
        """
        raise NotImplementedError

    @property
    def words(self) -> str:
        """Which tokens, as in: keeps its KV of …"""
        raise NotImplementedError

    def held(self, context: int, prompt: int | None = None) -> int:
        """How many tokens are held after ``context``, of which the first ``prompt`` were a prompt.

        ``prompt``: None if all of them were.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The name and the fields, as JSON values."""
        return {"keep": self.name, **asdict(self)}  # type: ignore[call-overload]
