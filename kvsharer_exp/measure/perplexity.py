"""Measure the perplexity of a live model on windows of tokens.

`HeldOutScorer` calls it under the map that the model runs with at that moment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch.nn import functional

from kvsharer_exp.measure.overflow import overflow
from kvsharer_exp.model.devices import input_device
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.values.finite import finite


@torch.no_grad()
def window_losses(
    model: Any, windows: torch.Tensor, batch_size: int = 8, prompt: int | None = None
) -> list[float]:
    """The mean negative log-likelihood of each window's predicted tokens, in nats.

    ``windows``: token ids (num_windows, window_tokens). The first token of a window is given, not
    predicted; where its first ``prompt`` tokens are a prompt, only what the tokens after it predict
    counts. The model runs a plain forward pass without a cache; sums are in float64.
    """
    first = prompt or 0
    losses: list[float] = []
    for batch in windows.split(batch_size):
        batch = batch.to(input_device(model))
        logits = model(input_ids=batch, use_cache=False).logits[:, first:]
        for row, tokens in zip(logits, batch, strict=True):  # one float32 copy at a time
            lost = functional.cross_entropy(
                row[:-1].float(), tokens[first + 1 :].to(row.device), reduction="none"
            )
            losses.append(lost.double().mean().item())
            if not math.isfinite(losses[-1]):
                raise overflow(model, attention_layers(model), tokens, len(losses) - 1)
    return losses


def perplexity_of(losses: Sequence[float]) -> float:
    """The perplexity, which is the exponential of the mean of `window_losses`.

    Raises:
        NotFiniteError: not a finite number.
    """
    return finite("perplexity", math.exp(fmean(losses)))


def perplexity(model: Any, windows: torch.Tensor, batch_size: int = 8) -> float:
    """The perplexity of ``windows`` (num_windows, window_tokens); see `window_losses`."""
    return perplexity_of(window_losses(model, windows, batch_size))
