"""Divide the memory budget of an `Evaluator` before it scores anything.

At most half of the budget goes to the full model's next-token probabilities. The vocabulary makes
them the largest tensors. The rest goes to layer states, from which candidates resume. If the states
of two maps do not fit in the rest, only those of the first layers that fit are kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from kvsharer_exp.model.sharing.architectures import AttentionLayer


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How much is kept.

    ``probability_batches`` first batches keep the reference probabilities, and ``state_layers``
    first layers keep their states. ``state_bytes`` is what states may take beside those of the map
    that is being scored.
    """

    probability_batches: int
    state_layers: int
    state_bytes: int


def plan_memory(
    model: Any,
    layers: Sequence[AttentionLayer],
    batches: Sequence[torch.Tensor],
    budget: int,
    prompt: int = 0,
) -> MemoryPlan:
    """Divide ``budget`` bytes for windows in ``batches`` of token ids (windows, tokens).

    Nothing is predicted in the first ``prompt`` tokens of a window.
    """
    config = model.config.get_text_config(decoder=True)
    scored = (batch[:, prompt:].numel() for batch in batches)
    sums = list(accumulate(tokens * config.vocab_size * 4 for tokens in scored))
    probability_batches = bisect_right(sums, budget // 2)
    budget -= sums[probability_batches - 1] if probability_batches else 0
    num_tokens = sum(batch.numel() for batch in batches)
    per_token = [
        config.hidden_size * model.dtype.itemsize + layer.kv_bytes_per_token for layer in layers
    ]
    under_way = [num_tokens * size for size in accumulate(per_token)]
    state_layers = bisect_right(under_way, budget // 2)
    left = budget - (under_way[state_layers - 1] if state_layers else 0)
    return MemoryPlan(probability_batches, state_layers, left)
