"""Distances between layers, and the ranking that orders pairs by them.

KVSharer ranks by Euclidean distance and tries the most *dissimilar* pair first; its text and its
released code measure it differently, so both are here under their own names.
https://arxiv.org/abs/2410.18517 §3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from kvsharer_exp.measure.calibration import LayerMeans
from kvsharer_exp.model.sharing.architectures import attention_layers, may_share
from kvsharer_exp.values.ranking import DissimilarityRanking, LayerPair


def euclidean_flat(a: torch.Tensor, b: torch.Tensor) -> float:
    """L2 norm of the difference of the flattened means (the paper's text)."""
    return (a - b).norm().item()


def euclidean_token(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over (head, token) of the L2 norm over head_dim (the authors' code)."""
    return (a - b).norm(dim=-1).mean().item()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """1 - cosine of the flattened means, in [0, 2]."""
    return 1 - nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def cka(a: torch.Tensor, b: torch.Tensor) -> float:
    """1 - linear CKA over tokens, in [0, 1] (Kornblith et al., https://arxiv.org/abs/1905.00414)."""
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
BLOCK_OUTPUT = "block_output"  # `calibration.block_errors`: no distance of means, but ranks too
STATES = {"kv": ("keys", "values"), "k": ("keys",), "v": ("values",)}


def distance_matrix(
    model: nn.Module,
    means: LayerMeans,
    *,
    distance: str,
    states: str = "kv",
    key_weight: float = 0.5,
) -> list[list[float]]:
    """``matrix[target][source]``: mean over the chosen states; NaN where the pair may not share.

    Args:
        key_weight: share of the keys in that mean, in [0, 1]; the values have the rest. With one
            kind of ``states`` alone there is nothing to weigh.
    """
    measure = DISTANCES[distance]
    weights = dict.fromkeys(STATES[states], 1.0)
    if states == "kv":
        weights = {"keys": key_weight, "values": 1 - key_weight}
    kinds = [(getattr(means, kind), weight) for kind, weight in weights.items() if weight]
    layers = attention_layers(model)
    return [
        [
            sum(weight * measure(kind[target.index], kind[source.index]) for kind, weight in kinds)
            if may_share(target, source)
            else math.nan
            for source in layers
        ]
        for target in layers
    ]


def rank(matrix: list[list[float]], *, model_id: str, distance: str) -> DissimilarityRanking:
    """Pairs of ``matrix`` (see `distance_matrix`), most dissimilar first; ties by layer index."""
    pairs = [
        LayerPair(target, source, value)
        for target, row in enumerate(matrix)
        for source, value in enumerate(row)
        if not math.isnan(value)
    ]
    pairs.sort(key=lambda pair: (-pair.distance, pair.target, pair.source))
    return DissimilarityRanking(model_id, distance, len(matrix), tuple(pairs))
