"""The keep ``snapkv``: the prompt's tokens that its last ones attend to.

SnapKV found that the queries at the end of a prompt attend to the tokens that the answer will read:
https://arxiv.org/abs/2404.14469.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from kvsharer_exp.values.errors import at_least
from kvsharer_exp.values.keeps.budget import TEXT, Budget, BudgetKeep, read_budget


@dataclass(frozen=True, slots=True)
class SnapKV(BudgetKeep):
    """Text ``snap512+32``: 512 tokens of the prompt, of which the last 32 choose the others.

    When the prompt has ended, each KV head keeps the last ``observe`` tokens and those others that
    their queries attend to most, ``budget`` in all. All tokens after the prompt stay. ``budget``
    may be a fraction of the prompt (``snap0.25+32``).

    Raises:
        InputError: ``observe`` is below 1, or ``budget`` below it or no number of tokens.
    """

    budget: Budget
    observe: int = 32

    name: ClassVar[str] = "snapkv"

    def __post_init__(self) -> None:
        at_least("the number of tokens that snap observes", self.observe, 1)
        self.check_budget(self.observe, f"snap lets the last {self.observe} tokens choose a budget")

    @classmethod
    def read(cls, text: str) -> SnapKV | None:
        parts = re.fullmatch(rf"snap{TEXT}\+([0-9]+)", text)
        return None if parts is None else cls(read_budget(parts[1]), int(parts[2]))

    def __str__(self) -> str:
        return f"snap{self.budget_text}+{self.observe}"

    @property
    def words(self) -> str:
        return f"{self.budget_words} of the prompt that its last {self.observe} attend to"

    def chosen(self, prompt: int) -> int:
        """How many of ``prompt`` tokens stay."""
        return min(prompt, self.budget_of(prompt, self.observe))

    def held(self, context: int, prompt: int | None = None) -> int:
        prompt = context if prompt is None else min(prompt, context)
        return self.chosen(prompt) + context - prompt
