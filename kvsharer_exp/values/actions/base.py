"""What every action of a KV plan is: what one layer does about its keys and values.

A `KVPlan` holds one action a layer. `registry` lists the actions. Each class here says what its
text is and which layers' keys and values the attention reads; the class that ``runner`` names does
the same in a model (`kvsharer_exp.model.actions`).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar


class Action:
    """Base of the actions, which are frozen dataclasses of plain values.

    ``name`` stands for the action in JSON and in options. ``runner`` is the ``module:class`` that
    runs it. ``fitted``: whether it needs numbers that are measured on text (a stand-in's).
    ``bounded``: whether it holds the KV of some tokens only.
    """

    __slots__ = ()

    name: ClassVar[str]
    runner: ClassVar[str]
    fitted: ClassVar[bool] = False
    bounded: ClassVar[bool] = False

    @classmethod
    def read(cls, text: str, layer: int) -> Action | None:
        """Read ``text`` at ``layer``; None when it is not the text of this action.

        Raises:
            InputError: it is, but a part of it breaks a rule.
        """
        raise NotImplementedError

    def text(self, layer: int) -> str:
        """The text of this action at ``layer``, which `read` reads back."""
        raise NotImplementedError

    def canonical(self, layer: int) -> Action:
        """The simplest action that does the same at ``layer``."""
        return self

    def keys_from(self, layer: int) -> int | None:
        """The layer whose keys are read, maybe ``layer`` itself; None where there is no attention.

        A layer that is its own source stores them.
        """
        return None

    def values_from(self, layer: int) -> int | None:
        """The layer whose values are read, as `keys_from` for keys."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """The name and the fields, as JSON values."""
        return {"action": self.name, **asdict(self)}  # type: ignore[call-overload]
