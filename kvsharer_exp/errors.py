"""The one error that is the user's to mend; every other exception is ours."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class InputError(ValueError):
    """Bad input: one line with the value, the rule and the way out. Exit code 2."""


def did_you_mean(value: str, choices: Sequence[str]) -> str:
    """The nearest of ``choices``, or all of them."""
    near = difflib.get_close_matches(value, choices, n=1)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(choices)}"
