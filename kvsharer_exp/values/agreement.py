"""How far two runtimes agree on the items of a task: item by item, not only in the mean.

Two runtimes can have the same accuracy and be right on other items. `kvsharer evaluate engine=vllm`
lays the answers of the engine beside those of this package's own runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvsharer_exp.values.intervals import is_binary
from kvsharer_exp.values.record import Record

Answer = tuple[float, bool | None]
"""The log-likelihood of a text in nats, and whether it is the greedy one, if that was asked."""

Likelihoods = Callable[[Sequence[tuple[list[int], list[int]]]], list[tuple[float, bool]]]
"""Gives for each (context, continuation) of token ids the log-likelihood of the continuation in
nats, and whether it is the greedy one."""


@dataclass(frozen=True, slots=True)
class Agreement(Record):
    """What two runtimes have in common on the items of one task.

    Args:
        items: the number of items.
        same_choice: on how many both choose the same of several texts, or find the only text greedy
            or not alike. None if an item is a text that is only weighed.
        same_score: on how many the main metric is the same. None if it is not 0 or 1.
        texts: the number of texts that were weighed.
        largest_difference: of the log-likelihoods of one text, in nats.
    """

    items: int
    same_choice: int | None
    same_score: int | None
    texts: int
    largest_difference: float


def agreement(
    one: Sequence[Sequence[Answer]],
    other: Sequence[Sequence[Answer]],
    *,
    scores: Sequence[float],
    other_scores: Sequence[float],
) -> Agreement:
    """Compare two runtimes on the same items.

    Args:
        one: for each item the answers for its texts; ``other`` those of the other runtime.
        scores: the main metric of each item; ``other_scores`` those of the other runtime.

    Raises:
        ValueError: there are no items, or the two have not the same items and texts.
    """
    pairs = [
        (a[0], b[0])
        for answers, others in zip(one, other, strict=True)
        for a, b in zip(answers, others, strict=True)
    ]
    if not pairs:
        raise ValueError("no items to compare: give at least one")
    choices = [(_choice(a), _choice(b)) for a, b in zip(one, other, strict=True)]
    chosen = all(None not in pair for pair in choices)
    binary = is_binary(scores) and is_binary(other_scores)
    return Agreement(
        items=len(one),
        same_choice=sum(a == b for a, b in choices) if chosen else None,
        same_score=sum(a == b for a, b in zip(scores, other_scores, strict=True))
        if binary
        else None,
        texts=len(pairs),
        largest_difference=max(abs(a - b) for a, b in pairs),
    )


def _choice(answers: Sequence[Answer]) -> int | bool | None:
    """The place of the likeliest text; of a single text whether it is greedy."""
    if len(answers) == 1:
        return answers[0][1]
    likelihoods = [value for value, _ in answers]
    return likelihoods.index(max(likelihoods))
