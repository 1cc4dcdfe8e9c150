"""The errors that are no fault of ours; any part of the package may raise them.

One is for what the user gave and can mend, and one for a server that stays away. Any other
exception that reaches the user is a fault of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class InputError(ValueError):
    """The input is bad: the message says in one line the value, the rule and the way out.

    The command line then ends with exit code 2.
    """


MALFORMED = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RecursionError, TypeError, ValueError),
)
"""What Python raises where JSON holds other values than were written; one may be an InputError."""


class UnansweredError(Exception):
    """A server did not answer for long: the message says what waits for it, and what delivers it.

    The command line then ends with exit code 1.
    """


def at_least(key: str, value: int, least: int) -> None:
    """Refuse a ``value`` that is not a whole number of at least ``least``.

    The type is checked too, because options come as the user wrote them.

    Raises:
        InputError: the value is refused; the message names ``key`` and ``value``.
    """
    if not isinstance(value, int):
        raise InputError(f"{key}={value}: give a whole number")
    if value < least:
        raise InputError(f"{key}={value}: give at least {least}")


def did_you_mean(value: str, choices: Sequence[str]) -> str:
    """Suggest the one of ``choices`` most like ``value``; if none is like it, list them all."""
    near = difflib.get_close_matches(value, choices, n=1)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(choices)}"
