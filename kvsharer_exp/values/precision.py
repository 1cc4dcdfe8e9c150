"""In how many bits a layer keeps its keys and values, and how many bytes that takes.

`actions.own.Own` has a `Precision`. The packed store of ``model/stores/`` follows the same layout,
which is that of KIVI (arXiv 2402.02750). Keys are quantised by channel over ``group`` consecutive
tokens, values by token over neighbouring channels. Every group has a scale and a minimum.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import clip

BITS = (2, 3, 4, 8, 16)
FULL = 16
_PARAMETERS = 4  # bytes of the scale and the minimum of a group, 16 bits each
_TEXT = re.compile(r"q([0-9]+)(?:g([0-9]+))?(?:s([0-9]+))?")


@dataclass(frozen=True, slots=True)
class Precision:
    """``bits`` per element in groups of ``group`` tokens; the first ``sinks`` tokens stay in full.

    With 16 bits nothing is quantised, and the other two have no meaning: they become the defaults.

    Raises:
        InputError: the bits are not known, ``group`` is no multiple of 8, or there are more sinks
            than tokens in a group.
    """

    bits: int = FULL
    group: int = 32
    sinks: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in BITS:
            raise InputError(
                f"{clip(str(self.bits), 20)} bits: give one of {', '.join(map(str, BITS))}"
            )
        if self.bits == FULL:
            object.__setattr__(self, "group", 32)
            object.__setattr__(self, "sinks", 0)
        if not isinstance(self.group, int) or self.group < 8 or self.group % 8:
            raise InputError(f"a group of {clip(str(self.group), 20)} tokens: give a multiple of 8")
        if not isinstance(self.sinks, int) or not 0 <= self.sinks <= self.group:
            raise InputError(
                f"{clip(str(self.sinks), 20)} sink tokens: "
                f"give 0 to {clip(str(self.group), 20)}, one group's tokens"
            )

    @classmethod
    def read(cls, text: str) -> Precision | None:
        """Read ``q4g64s4``, where the parts after the bits may be left out, or nothing at all."""
        if not text:
            return cls()
        found = _TEXT.fullmatch(text)
        if found is None:
            return None
        bits, group, sinks = found.groups()
        return cls(int(bits), int(group or 32), int(sinks or 0))

    def __str__(self) -> str:
        if self.bits == FULL:
            return ""
        group = "" if self.group == 32 else f"g{self.group}"
        return f"q{self.bits}{group}" + (f"s{self.sinks}" if self.sinks else "")

    def channels(self, head_dim: int) -> int:
        """The number of neighbouring channels that share a scale in the values of a token."""
        return max(n for n in range(1, min(self.group, head_dim) + 1) if head_dim % n == 0)

    def key_bytes(
        self,
        context: int,
        first: int,
        heads: int,
        head_dim: int,
        size: int,
        sinks: int | None = None,
    ) -> int:
        """Bytes of the keys of one sequence after ``context`` tokens.

        Tokens before ``first`` are no longer read (a window), but for the first ``sinks``, if these
        stay; None: those of the precision, as long as a window holds one of them. ``size`` is that
        of an unquantised element. Groups that are complete are packed. The others wait in full.
        """
        if self.bits == FULL:
            return (context - first + min(sinks or 0, first)) * heads * head_dim * size
        closed = context // self.group
        packed = (closed - first // self.group) * (self.group * self.bits // 8 + _PARAMETERS)
        full = context - closed * self.group
        full += self._sinks(first, sinks) if closed else 0
        return heads * head_dim * (packed + full * size)

    def value_bytes(
        self,
        context: int,
        first: int,
        heads: int,
        head_dim: int,
        size: int,
        sinks: int | None = None,
    ) -> int:
        """Bytes of the values of one sequence, as `key_bytes`. Each token is packed at once."""
        if self.bits == FULL:
            return self.key_bytes(context, first, heads, head_dim, size, sinks)
        groups = head_dim // self.channels(head_dim)
        packed = (context - first) * (head_dim * self.bits // 8 + groups * _PARAMETERS)
        full = min(self._sinks(first, sinks), context)
        return heads * (packed + full * head_dim * size)

    def _sinks(self, first: int, sinks: int | None) -> int:
        """How many first tokens are held in full, when ``first`` is the first that a window has."""
        if sinks is None:
            return self.sinks if first < self.sinks else 0
        return sinks
