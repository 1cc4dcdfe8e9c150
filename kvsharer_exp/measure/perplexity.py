"""Perplexity of a live model on windows of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch.nn import functional


def finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RuntimeError(f"{name} is {value!r}, not a finite number")
    return float(value)


@torch.no_grad()
def window_losses(model: Any, windows: torch.Tensor, batch_size: int = 8) -> list[float]:
    """Mean negative log-likelihood over the predicted tokens of every window, nats.

    windows: token ids ``(num_windows, window_tokens)``; the first token of each is not predicted.
    A plain forward pass without a cache; summed in float64.
    """
    losses: list[float] = []
    for batch in windows.split(batch_size):
        batch = batch.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits
        for row, tokens in zip(logits, batch, strict=True):  # one float32 copy at a time
            lost = functional.cross_entropy(
                row[:-1].float(), tokens[1:].to(row.device), reduction="none"
            )
            losses.append(lost.double().mean().item())
    return losses


def perplexity_of(losses: Sequence[float]) -> float:
    """exp of the mean of `window_losses`.

    Raises:
        RuntimeError: not a finite number.
    """
    return finite("perplexity", math.exp(fmean(losses)))


def perplexity(model: Any, windows: torch.Tensor, batch_size: int = 8) -> float:
    """`perplexity_of` the `window_losses`: all windows are of one length."""
    return perplexity_of(window_losses(model, windows, batch_size))
