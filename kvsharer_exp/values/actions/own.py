"""The action ``own``: a layer keeps its own KV, in 16 bits or quantised, of all tokens or some."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.keeps.base import Keep
from kvsharer_exp.values.keeps.registry import keep_from_dict, read_keep
from kvsharer_exp.values.precision import FULL, Precision
from kvsharer_exp.values.text import clip

_TEXT = re.compile(r"([0-9]+)((?:q[0-9]+(?:g[0-9]+)?(?:s[0-9]+)?)?)(.*)")


@dataclass(frozen=True, slots=True)
class Own(Action):
    """Texts at layer 5: ``5``, ``5q4``, ``5q3g64s4``, ``5w4+252``, ``5q4snap512+32``, ``5h0.25``.

    ``bits``, ``group`` and ``sinks`` are those of `Precision`. ``keep`` says which tokens are held;
    None: all. The sinks of a keep are those of the precision too, so only one is given.

    Raises:
        InputError: see `Precision` and the keeps, or both have sinks.
    """

    bits: int = FULL
    group: int = 32
    sinks: int = 0
    keep: Keep | None = None

    name: ClassVar[str] = "own"
    runner: ClassVar[str] = "kvsharer_exp.model.actions.own:OwnRunner"

    def __post_init__(self) -> None:
        keep: Any = self.keep
        if isinstance(keep, dict):
            object.__setattr__(self, "keep", keep_from_dict(keep))
        elif keep is not None and not isinstance(keep, Keep):
            raise InputError(f"{clip(repr(keep), 30)} is no keep: give Window(4, 252) or w4+252")
        checked = _precision(self.bits, self.group, self.sinks)
        object.__setattr__(self, "bits", checked.bits)
        object.__setattr__(self, "group", checked.group)
        object.__setattr__(self, "sinks", checked.sinks)
        if self.keep is not None and self.sinks:
            raise InputError(
                f"s{self.sinks} beside {self.keep}: what it keeps says which tokens stay in full, "
                "leave the s out"
            )
        _ = self.precision  # refuses sinks of the keep that the bits cannot have

    @property
    def precision(self) -> Precision:
        """How the tokens are held, with the sinks of the keep."""
        sinks = self.sinks if self.keep is None else self.keep.sinks
        return _precision(self.bits, self.group, sinks)

    @property
    def quantised(self) -> bool:
        return self.bits != FULL

    @property
    def bounded(self) -> bool:  # type: ignore[override]
        return self.keep is not None

    @property
    def words(self) -> str:
        """In how many bits, and of which tokens."""
        return f"{self.bits} bits" + ("" if self.keep is None else f" of {self.keep.words}")

    @classmethod
    def read(cls, text: str, layer: int) -> Own | None:
        found = _TEXT.fullmatch(text)
        if found is None or int(found[1]) != layer:
            return None
        keep = read_keep(found[3])
        if found[3] and keep is None:
            return None
        precision = Precision.read(found[2])
        assert precision is not None  # `_TEXT` holds only such texts
        return cls(precision.bits, precision.group, precision.sinks, keep)

    def text(self, layer: int) -> str:
        precision = _precision(self.bits, self.group, self.sinks)
        return f"{layer}{precision}{'' if self.keep is None else self.keep}"

    def keys_from(self, layer: int) -> int:
        return layer

    def values_from(self, layer: int) -> int:
        return layer

    def to_dict(self) -> dict[str, Any]:
        fields = {"bits": self.bits, "group": self.group, "sinks": self.sinks}
        keep = {} if self.keep is None else {"keep": self.keep.to_dict()}
        return {"action": self.name, **fields, **keep}


_precision = cache(Precision)
