"""The values of the items behind a score of lm-eval, and the score's standard error."""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import Any

from kvsharer_exp.values.finite import as_number

# lm-eval's aggregations whose items are (sum, weight) pairs.
_WEIGHTED = ("weighted_perplexity", "bits_per_byte", "weighted_mean")


def is_weighted(task: Any, metric: str) -> bool:
    """Whether the items behind ``metric`` are (sum, weight) pairs."""
    return getattr(task.aggregation().get(metric), "__name__", "") in _WEIGHTED


def per_item(items: list[Any], weighted: bool) -> list[float]:
    """Give numbers as they are, and (log-likelihood, weight) pairs as quotients.

    Other items, like the (gold, predicted) pairs behind F1, are no values that could be compared.
    There are none then.
    """
    if weighted:
        return [float(value) / max(weight, 1) for value, weight in items]
    numbers = [as_number(item) for item in items]
    return [number for number in numbers if number is not None] if None not in numbers else []


def standard_error(metric: str, score: float, items: list[Any], weighted: bool) -> float | None:
    """The standard error of ``score``; None if there is no formula for it.

    There is one for a mean. For exp(-mean) and for a ratio of sums it is the delta method's.
    """
    if len(items) < 2:
        return None
    root = math.sqrt(len(items))
    if weighted:
        if metric not in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
            return None
        rate = sum(value for value, _ in items) / sum(weight for _, weight in items)
        residuals = [value - rate * weight for value, weight in items]
        error = stdev(residuals) / root / fmean(weight for _, weight in items)
        return error / math.log(2) if metric == "bits_per_byte" else score * error
    numbers = per_item(items, weighted)
    if not numbers:
        return None
    error = stdev(numbers) / root
    if metric == "perplexity":
        return score * error
    return error if math.isclose(fmean(numbers), score, abs_tol=1e-9) else None
