"""Measure the distances between layers, and rank pairs of layers by them.

The commands call `distance_matrix` on the layer means of `calibration`, and `rank` on the result.
Every distance takes the means of two layers, each (num_key_value_heads, window_tokens, head_dim).

KVSharer ranks by Euclidean distance and tries the most *dissimilar* pair first. Its text and its
released code measure this distance differently, so both are here under their own names.
KVSharer §3.2, https://arxiv.org/abs/2410.18517.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from kvsharer_exp.measure.calibration import LayerMeans
from kvsharer_exp.model.sharing.architectures import attention_layers, may_share
from kvsharer_exp.values.finite import finite
from kvsharer_exp.values.ranking import DissimilarityRanking, LayerPair


def euclidean_flat(a: torch.Tensor, b: torch.Tensor) -> float:
    """Take the L2 norm of the difference of the flattened means (the paper's text)."""
    return (a - b).norm().item()


def euclidean_token(a: torch.Tensor, b: torch.Tensor) -> float:
    """Take the mean over (head, token) of the L2 norm over head_dim (the authors' code)."""
    return (a - b).norm(dim=-1).mean().item()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Take 1 - cosine of the flattened means, in [0, 2]."""
    return 1 - nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def cka(a: torch.Tensor, b: torch.Tensor) -> float:
    """Take 1 - linear CKA over tokens, in [0, 1].

    Kornblith et al., https://arxiv.org/abs/1905.00414.
    """
    x, y = (m.transpose(0, 1).flatten(1).double() for m in (a, b))  # (tokens, heads x head_dim)
    x, y = x - x.mean(0), y - y.mean(0)
    norm = (x.T @ x).norm() * (y.T @ y).norm()
    return 1 - ((x.T @ y).norm() ** 2 / norm).item() if norm > 0 else 0.0


DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], float]] = {
    "euclidean_flat": euclidean_flat,
    "euclidean_token": euclidean_token,
    "cosine": cosine,
    "cka": cka,
}
BLOCK_OUTPUT = "block_output"  # ranks by `calibration.block_errors`, not by distances of means
STATES = {"kv": ("keys", "values"), "k": ("keys",), "v": ("values",)}


def distance_matrix(
    model: nn.Module,
    means: LayerMeans,
    *,
    distance: str,
    states: str = "kv",
    key_weight: float = 0.5,
) -> list[list[float]]:
    """Measure the distance of every pair of layers, as ``matrix[target][source]``.

    It is the mean over the chosen ``states``, and NaN where the pair may not share.

    Args:
        distance: a name of `DISTANCES`.
        states: a name of `STATES`: keys and values, or one of them.
        key_weight: the weight of the keys in that mean, in [0, 1]; the values have the rest. It
            has no effect if ``states`` is keys alone or values alone.

    Raises:
        NotFiniteError: a distance is no finite number, which would leave its pair out.
    """
    measure = DISTANCES[distance]
    weights = dict.fromkeys(STATES[states], 1.0)
    if states == "kv":
        weights = {"keys": key_weight, "values": 1 - key_weight}
    kinds = [(getattr(means, kind), weight) for kind, weight in weights.items() if weight]
    layers = attention_layers(model)

    def between(target: int, source: int) -> float:
        value = sum(weight * measure(kind[target], kind[source]) for kind, weight in kinds)
        return finite(f"{distance} between layers {target} and {source}", value)

    return [
        [
            between(target.index, source.index) if may_share(target, source) else math.nan
            for source in layers
        ]
        for target in layers
    ]


def rank(matrix: list[list[float]], *, model_id: str, distance: str) -> DissimilarityRanking:
    """Rank the pairs of ``matrix`` (see `distance_matrix`), most dissimilar first.

    Pairs of equal distance are ordered by layer index. Pairs that may not share are left out.
    """
    pairs = [
        LayerPair(target, source, value)
        for target, row in enumerate(matrix)
        for source, value in enumerate(row)
        if not math.isnan(value)
    ]
    pairs.sort(key=lambda pair: (-pair.distance, pair.target, pair.source))
    return DissimilarityRanking(model_id, distance, len(matrix), tuple(pairs))
