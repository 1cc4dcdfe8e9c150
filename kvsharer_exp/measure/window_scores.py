"""Compare what a map computed on some windows with what the full model computed on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from kvsharer_exp.values.scores import CandidateScores


def cosines(hidden: torch.Tensor, reference: torch.Tensor) -> tuple[float, ...]:
    """By window the cosine of the flattened last hidden states, each (windows, tokens, hidden)."""
    similarity = nn.functional.cosine_similarity
    return tuple(similarity(hidden.float().flatten(1), reference.float().flatten(1)).tolist())


def losses(
    tokens: torch.Tensor,
    raw: torch.Tensor,
    probabilities: Sequence[torch.Tensor] | torch.Tensor,
    entropies: torch.Tensor,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """By window the KL to the full model and the negative log-likelihood, nats.

    Args:
        tokens: token ids (windows, tokens).
        raw: the map's logits (windows, tokens, vocabulary).
        probabilities: the full model's of the next token, likewise; float32.
        entropies: theirs (windows, tokens).
    """
    kls, nlls = [], []
    # One window at a time, because the vocabulary makes these the largest tensors here.
    for ids, logits, p, entropy in zip(tokens, raw, probabilities, entropies, strict=True):
        q = logits.log_softmax(-1, dtype=torch.float32)
        kl = (-entropy - torch.linalg.vecdot(p, q)).mean(dtype=torch.float64).item()
        kls.append(kl if math.isnan(kl) else max(0.0, kl))  # rounding may go below 0
        nlls.append(-q[:-1].gather(-1, ids[1:, None]).mean(dtype=torch.float64).item())
    return tuple(kls), tuple(nlls)


def first_not_finite(scores: CandidateScores) -> int | None:
    """The first window with a value that is NaN or infinite; None where there is none."""
    measured = [part for part in (scores.cosines, scores.kls, scores.nlls) if part]
    for window, values in enumerate(zip(*measured, strict=True)):
        if not all(map(math.isfinite, values)):
            return window
    return None
