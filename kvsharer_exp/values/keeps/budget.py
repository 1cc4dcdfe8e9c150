"""What the keeps share that hold a budget of a prompt's tokens: a number of them, or a fraction."""

from __future__ import annotations

from typing import ClassVar

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.keeps.base import Keep
from kvsharer_exp.values.text import clip

Budget = int | float
TEXT = r"([0-9]+(?:\.[0-9]+)?)"
"""A number of tokens, or a fraction with a decimal point; the keep refuses those that are none."""


def read_budget(text: str) -> Budget:
    """The number that a text of the form `TEXT` means."""
    return float(text) if "." in text else int(text)


class BudgetKeep(Keep):
    """Base of the keeps that choose at the end of a prompt how much of it stays: a ``budget``."""

    __slots__ = ()

    prompted: ClassVar[bool] = True
    sinks: ClassVar[int] = 0  # type: ignore[misc]
    budget: Budget

    def check_budget(self, least: int, what: str) -> None:
        """Refuse a budget that is no number of at least ``least`` tokens, and no fraction.

        Raises:
            InputError: it is neither, or has more than four decimals. ``what`` begins the message.
        """
        budget = self.budget
        number = isinstance(budget, int) and not isinstance(budget, bool) and budget >= least
        fraction = isinstance(budget, float) and 0 < budget < 1 and round(budget, 4) == budget
        if not number and not fraction:
            raise InputError(
                f"{what} of {clip(repr(budget), 20)} tokens: give a whole number of at least "
                f"{least}, or a fraction of the prompt like 0.25 with at most four decimals"
            )

    @property
    def budget_text(self) -> str:
        """The budget as a text of the form `TEXT`."""
        budget = self.budget
        return str(budget) if isinstance(budget, int) else f"{budget:.4f}".rstrip("0")

    @property
    def budget_words(self) -> str:
        budget = self.budget
        return (
            f"{budget} tokens" if isinstance(budget, int) else f"{budget * 100:g} % of the tokens"
        )

    def budget_of(self, prompt: int, least: int) -> int:
        """The tokens that the budget has room for; of a fraction at least ``least``, halves up."""
        if isinstance(self.budget, int):
            return self.budget
        return max(least, int(self.budget * prompt + 0.5))
