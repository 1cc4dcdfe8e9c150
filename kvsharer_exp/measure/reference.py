"""What an `Evaluator` keeps of the full model, to compare candidates with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True)
class Reference:
    """What the full model computed on one batch: ``hidden`` is (batch, tokens, hidden_size).

    Once a KL is asked for, ``entropies`` (batch, tokens) are those of the next-token distributions.
    If they fit, ``probabilities`` (batch, tokens, vocabulary) are kept too. Both are float32. The
    tokens are those that are scored, but in ``last_output``, which is what the last block returned.
    """

    hidden: torch.Tensor
    last_output: Any
    entropies: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None
