"""Runs the action ``constant``: the attention adds its mean output on the calibration text."""

from __future__ import annotations

import torch

from kvsharer_exp.model.actions.stand_in import StandInRunner
from kvsharer_exp.model.moments import Moments, constant_fit


class ConstantRunner(StandInRunner):
    """The fit is the mean output."""

    tensors = ("bias",)

    def parameters_needed(self, hidden_size: int) -> int:
        return hidden_size

    def fit(self, fitted: Moments, held: Moments) -> dict[str, torch.Tensor]:
        return {"bias": constant_fit(fitted + held)}
