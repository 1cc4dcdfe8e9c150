"""Numbers that are numbers: NaN and infinity are refused where a value comes in.

A comparison, a sort or a ``max`` that meets NaN answers without a word, and the answer is wrong: a
KL of NaN once counted as 0, the best there is. So whoever measures a value asks here, and whoever
compares values may rely on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

from kvsharer_exp.values.errors import InputError


class NotFiniteError(InputError, ArithmeticError):
    """A measured value is NaN or infinite.

    As an `ArithmeticError` it fails the one trial that met it. Where no trial is under way it is an
    `InputError`, because another dtype is the way out.
    """


def as_number(value: Any) -> float | None:
    """``value`` as a plain float where it is a real number of Python, numpy or torch; else None.

    A truth value counts as 0 or 1, and an array or tensor counts where it holds a single item.
    """
    plain = _plain(value)
    return float(plain) if isinstance(plain, Real) else None


def finite(name: str, value: Any) -> float:
    """``value`` as a plain float, see `as_number`; a truth value is no measured number.

    Raises:
        NotFiniteError: NaN, infinite, or no real number; ``name`` says whose value it is.
    """
    number = None if isinstance(_plain(value), bool) else as_number(value)
    if number is None or not math.isfinite(number):
        raise NotFiniteError(
            f"{name} is {repr(value)[:40]}, not a finite number: try another dtype"
        )
    return number


def _plain(value: Any) -> Any:
    """The one item of an array, a tensor or a scalar of theirs; anything else as it is."""
    shape = getattr(value, "shape", None)
    return value.item() if shape is not None and math.prod(shape) == 1 else value


def check_finite(name: str, values: Iterable[float]) -> None:
    """Refuse ``values`` unless all of them are finite.

    Raises:
        NotFiniteError: naming the first that is not by its place.
    """
    for place, value in enumerate(values):
        if not math.isfinite(value):
            raise NotFiniteError(f"{name}: value {place} is {value}, give finite numbers only")
