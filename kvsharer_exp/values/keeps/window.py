"""The keep ``window``: the first tokens and the most recent ones.

StreamingLLM found that a model stays whole if the first few tokens, which much attention sinks
into, stay beside a window of recent ones: https://arxiv.org/abs/2309.17453
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.keeps.base import Keep
from kvsharer_exp.values.text import clip


@dataclass(frozen=True, slots=True)
class Window(Keep):
    """Text ``w4+252``: token t reads tokens 0 to 3 and t - 251 to t, with the rotations they had.

    So a cache holds ``sinks`` tokens and ``recent`` - 1 of those before the next one.

    Raises:
        InputError: a number is negative, or the window does not hold the token itself.
    """

    sinks: int
    recent: int

    name: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("recent", 1)):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise InputError(
                    f"a window with {clip(repr(number), 20)} {name} tokens: "
                    f"give a whole number of at least {least}"
                )

    @classmethod
    def read(cls, text: str) -> Window | None:
        found = re.fullmatch(r"w([0-9]+)\+([0-9]+)", text)
        return None if found is None else cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"w{self.sinks}+{self.recent}"

    @property
    def tokens(self) -> int:
        """The most tokens that are held before the next one comes."""
        return self.sinks + self.recent - 1

    def held(self, context: int, prompt: int | None = None) -> int:
        return min(context, self.tokens)

    def is_within(self, window: int) -> bool:
        """Whether it holds fewer tokens than a layer whose own sliding window is ``window``."""
        return self.recent < window

    @property
    def words(self) -> str:
        return f"{self.sinks} first and {self.recent} recent tokens"

    def first_recent(self, context: int) -> int:
        """The first token, sinks aside, that the token after ``context`` others reads."""
        return max(0, context - self.recent + 1)
