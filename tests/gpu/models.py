"""Models, plans and a measure of distance that the GPU tests share."""

import copy

import torch
from transformers import PreTrainedModel

from kvsharer_exp.model.fitted_plan import FittedPlan
from tests.model.actions.plans import fitted
from tests.tiny import tiny_model

REHEARSAL = "KVSHARER_GPU_REHEARSAL"
"""The environment variable that has the GPU tests run on the CPU when it is 1."""

PLANS = {
    "share": "0_1_0_3_1_1",
    "drop": "0_x_2_x_4_5",
    "constant": "c_1_2_c_4_5",
    "affine": "0_a_2_3_a_5",
    "q4": "0q4g8s2_1q4g8_2q4g8_3q4g8s2_4q4g8_5q4g16s3",
}

# How far two ways to compute the same logits may be apart, as a part of their own size. The plan
# that is nearest to the full cache, q4, moves them by 0.06.
CLOSE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.03}


def llama_on(device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A copy of the tiny random llama; the weights are the same on every device."""
    return copy.deepcopy(tiny_model("llama")).to(device, dtype)  # type: ignore[call-arg]


def plan(name: str) -> FittedPlan:
    """The plan ``name`` of `PLANS` with random fits that are the same on every device."""
    return fitted(tiny_model("llama"), PLANS[name])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The distance of two tensors as a part of the size of ``other``."""
    one, other = one.double().cpu(), other.double().cpu()
    return float((one - other).norm() / other.norm())
