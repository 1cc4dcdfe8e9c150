"""The one error that is the user's to mend; every other exception is ours."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class InputError(ValueError):
    """Bad input: one line with the value, the rule and the way out. Exit code 2."""


def at_least(key: str, value: int, least: int) -> None:
    """Refuse what is no whole number from ``least`` up; options reach us as the user wrote them.

    Raises:
        InputError: naming ``key`` and ``value``.
    """
    if not isinstance(value, int):
        raise InputError(f"{key}={value}: give a whole number")
    if value < least:
        raise InputError(f"{key}={value}: give at least {least}")


def did_you_mean(value: str, choices: Sequence[str]) -> str:
    """The nearest of ``choices``, or all of them."""
    near = difflib.get_close_matches(value, choices, n=1)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(choices)}"
