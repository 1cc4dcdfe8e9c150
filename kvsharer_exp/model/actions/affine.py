"""Runs the action ``affine``: a matrix and a bias from the attention's input to its output."""

from __future__ import annotations

import torch

from kvsharer_exp.model.actions.stand_in import StandInRunner
from kvsharer_exp.model.moments import Moments, affine_fit


class AffineRunner(StandInRunner):
    """The fit is a ridge regression. Method: NBL, https://arxiv.org/abs/2505.21077."""

    tensors = ("weight", "bias")

    def parameters_needed(self, hidden_size: int) -> int:
        return hidden_size * (hidden_size + 1)

    def fit(self, fitted: Moments, held: Moments) -> dict[str, torch.Tensor]:
        weight, bias, _ = affine_fit(fitted, held)
        return {"weight": weight, "bias": bias}
