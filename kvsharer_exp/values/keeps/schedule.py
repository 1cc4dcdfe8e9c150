"""Budgets that shrink from the first layer to the last.

PyramidInfer found that deeper layers need fewer tokens of the prompt:
https://arxiv.org/abs/2405.12532. Here the layers choose them as SnapKV does.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.keeps.snapkv import SnapKV


def pyramid(layers: Sequence[int], mean: float, observe: int = 32) -> dict[int, SnapKV]:
    """What each of ``layers`` keeps, where the fractions fall in equal steps and have this mean.

    The steps are as large as they can be if no fraction is to be above 1 or below a tenth of the
    ``mean``. Layers that would keep all are left out.

    Raises:
        InputError: ``mean`` is no fraction.
    """
    if not 0 < mean < 1:
        raise InputError(f"a pyramid that keeps {mean} on average: give a fraction, like 0.8")
    reach = min(1 - mean, 0.9 * mean)
    found = {}
    for place, layer in enumerate(layers):
        depth = place / (len(layers) - 1) if len(layers) > 1 else 0.5
        fraction = round(mean + reach * (1 - 2 * depth), 4)
        if fraction < 1:
            found[layer] = SnapKV(fraction, observe)
    return found
