"""Compare the greedy answers of an engine with what `load_exported` answers, token by token.

The command ``serve`` does it with ``--check``. The reference reads a prompt and the engine's answer
in one forward, which gives its logits at every position of the answer. As long as its best token is
the engine's, this is the reference's own greedy answer. Where the two differ, the reference goes on
from the engine's token (teacher forcing), so that one difference does not hide what comes after.

In float32 every token has to be the same. Half precision rounds otherwise in another runtime, and
also in the same one: transformers itself ranks tokens otherwise when it reads them one by one. So
there a difference is accepted where both tokens are as good as each other: see `compare`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvsharer_exp.shipping.export import load_exported
from kvsharer_exp.values.record import Record

ACCEPTED_ULPS = 2.0
"""A distance of two logits that half precision may always rank either way."""

ACCEPTED_SHARE = 0.01
"""A share of positions at which such differences are always accepted."""

ACCEPTED_TIMES = 2
"""How many times as often as with itself the reference may differ from the engine."""

_MANTISSA_BITS = {"bfloat16": 7, "float16": 10}


@dataclass(frozen=True, slots=True)
class Difference(Record):
    """A position at which the engine gave another token than the reference's best.

    ``position`` counts the tokens of the answer from 0. ``gap`` is how much larger the logit of
    the reference's token is than that of the engine's; ``ulps`` is the gap in units of the last
    place of the larger, and None in float32.
    """

    prompt: int
    position: int
    engine: int
    reference: int
    gap: float
    ulps: float | None

    def __str__(self) -> str:
        ulps = "" if self.ulps is None else f", {self.ulps:g} ulps"
        return (
            f"prompt {self.prompt}, token {self.position}: engine {self.engine}, "
            f"reference {self.reference} (logits {self.gap:.3g} apart{ulps})"
        )


@dataclass(frozen=True, slots=True)
class TokenCheck(Record):
    """The outcome: of ``positions`` tokens ``equal`` are the same; the others are listed.

    ``own`` counts the positions at which the reference differs from itself.
    """

    dtype: str
    positions: int
    equal: int
    ties: tuple[Difference, ...]
    wrong: tuple[Difference, ...]
    own: int = 0

    @property
    def most_ties(self) -> float:
        """How many ties are accepted."""
        return max(ACCEPTED_SHARE * self.positions, ACCEPTED_TIMES * self.own)

    @property
    def passes(self) -> bool:
        return not self.wrong and len(self.ties) <= self.most_ties

    @property
    def problem(self) -> str:
        """Why the check fails; empty if it passes."""
        if self.wrong:
            return f"{len(self.wrong)} of {self.positions} tokens differ, {self.wrong[0]}"
        if not self.passes:
            return (
                f"{len(self.ties)} ties at {self.positions} tokens are more than "
                f"{self.most_ties:g}, {self.ties[0]}"
            )
        return ""

    @property
    def first_difference(self) -> Difference | None:
        """The first difference of the first prompt that has one; one that is no tie comes first."""
        return next(iter(self.wrong + self.ties), None)


def check_answers(
    folder: Path,
    dtype: str,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> TokenCheck:
    """Load the export in ``folder``, convert it to ``dtype``, and `compare` it with the engine.

    Raises:
        InputError: see `load_exported`.
    """
    model, _ = load_exported(folder)
    return compare(model.to(getattr(torch, dtype)), prompts, answers)


def compare(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> TokenCheck:
    """Compare the engine's ``answers`` to ``prompts``, all token ids, with those of ``model``.

    In half precision, the reference is also compared with itself: its best tokens when it reads the
    tokens one by one. A difference is accepted as a tie if the logits of both tokens are at most
    `ACCEPTED_ULPS` apart, or no further than where the reference differs from itself. The check
    passes if all are ties, and they are at most `ACCEPTED_SHARE` of all positions, or
    `ACCEPTED_TIMES` as many as the reference's own.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    differences: list[Difference] = []
    own: list[Difference] = []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        logits = reference_logits(model, prompt, answer)
        differences += _differences(index, answer, logits, dtype)
        if dtype in _MANTISSA_BITS:
            alone = stepwise_logits(model, prompt, answer).argmax(-1).tolist()
            own += _differences(index, alone, logits, dtype)
    most = max([ACCEPTED_ULPS, *(found.ulps or 0.0 for found in own)])
    ties = [found for found in differences if found.ulps is not None and found.ulps <= most]
    positions = sum(map(len, answers))
    return TokenCheck(
        dtype=dtype,
        positions=positions,
        equal=positions - len(differences),
        ties=tuple(ties),
        wrong=tuple(found for found in differences if found not in ties),
        own=len(own),
    )


def _differences(
    prompt: int, answer: Sequence[int], logits: torch.Tensor, dtype: str
) -> list[Difference]:
    """Where the tokens of ``answer`` are not the best ones of ``logits``."""
    found = []
    for position, (token, row) in enumerate(zip(answer, logits, strict=True)):
        best = int(row.argmax())
        if best != token:
            first, other = float(row[best]), float(row[token])
            ulps = ulps_apart(first, other, dtype)
            found.append(Difference(prompt, position, token, best, first - other, ulps))
    return found


def reference_logits(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """The logits of ``model`` at every token of ``answer``, float32 (answer tokens, vocabulary)."""
    ids = torch.tensor([[*prompt, *answer[:-1]]], device=model.device)
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[0]
    return logits[len(prompt) - 1 :].float()


def stepwise_logits(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """As `reference_logits`, where the model reads the answer token by token with its cache."""
    cache, rows = None, []
    with torch.inference_mode():
        for ids in ([*prompt], *([token] for token in answer[:-1])):
            inputs = torch.tensor([ids], device=model.device)
            output = model(inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits[0, -1])
    return torch.stack(rows).float()


def ulps_apart(one: float, other: float, dtype: str) -> float | None:
    """The distance of two numbers in units of the last place of the larger; None in float32."""
    if dtype not in _MANTISSA_BITS:
        return None
    largest = max(abs(one), abs(other))
    exponent = math.frexp(largest)[1] - 1 if largest else 0
    return abs(one - other) / 2.0 ** (exponent - _MANTISSA_BITS[dtype])
