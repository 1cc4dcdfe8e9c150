"""How many tokens of a prompt a keep holds: a number of them, or a fraction of the prompt."""

from __future__ import annotations

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import clip

Budget = int | float
TEXT = r"(\d+|0\.\d{1,4})"
"""A number of tokens, or a fraction with a decimal point."""


def checked(budget: Budget, least: int, what: str) -> Budget:
    """Give ``budget`` back if it is a number of at least ``least`` tokens, or a fraction.

    Raises:
        InputError: it is neither, or has more than four decimals.
    """
    number = isinstance(budget, int) and not isinstance(budget, bool) and budget >= least
    fraction = isinstance(budget, float) and 0 < budget < 1 and round(budget, 4) == budget
    if not number and not fraction:
        raise InputError(
            f"{what} of {clip(repr(budget), 20)} tokens: give a whole number of at least {least}, "
            "or a fraction of the prompt like 0.25 with at most four decimals"
        )
    return budget


def read_budget(text: str) -> Budget:
    """The number that a text of the form `TEXT` means."""
    return float(text) if "." in text else int(text)


def text_of(budget: Budget) -> str:
    return str(budget) if isinstance(budget, int) else f"{budget:.4f}".rstrip("0")


def tokens_of(budget: Budget, prompt: int, least: int) -> int:
    """How many of ``prompt`` tokens stay; of a fraction at least ``least``, halves rounded up."""
    tokens = budget if isinstance(budget, int) else max(least, int(budget * prompt + 0.5))
    return min(prompt, tokens)


def words_of(budget: Budget) -> str:
    return f"{budget} tokens" if isinstance(budget, int) else f"{budget * 100:g} % of the tokens"
