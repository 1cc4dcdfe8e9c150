"""The keep ``h2o``: the tokens that were attended to most so far, and the most recent ones.

Heavy-Hitter Oracle: https://arxiv.org/abs/2306.14048.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from kvsharer_exp.values.keeps.budget import TEXT, Budget, BudgetKeep, read_budget


@dataclass(frozen=True, slots=True)
class H2O(BudgetKeep):
    """Text ``h512``: never more than 512 tokens after the prompt, half of them the recent ones.

    Each KV head adds up the attention that its tokens get. When the prompt has ended, the tokens
    with the least go, and after every token that follows one goes. ``budget`` may be a fraction of
    the prompt (``h0.25``).

    Raises:
        InputError: ``budget`` is below 2 or no number of tokens.
    """

    budget: Budget

    name: ClassVar[str] = "h2o"

    def __post_init__(self) -> None:
        self.check_budget(2, "h keeps a budget")

    @classmethod
    def read(cls, text: str) -> H2O | None:
        parts = re.fullmatch(f"h{TEXT}", text)
        return None if parts is None else cls(read_budget(parts[1]))

    def __str__(self) -> str:
        return f"h{self.budget_text}"

    @property
    def words(self) -> str:
        return f"{self.budget_words} with the most attention"

    def most(self, prompt: int) -> int:
        """The most tokens that are held once a prompt of ``prompt`` tokens has ended."""
        return self.budget_of(prompt, 2)

    def recent(self, most: int) -> int:
        """How many of the last tokens stay whatever attention they got."""
        return most - most // 2

    def held(self, context: int, prompt: int | None = None) -> int:
        prompt = context if prompt is None else min(prompt, context)
        return min(context, self.most(prompt))
