"""Plans for the contract: every action, in mixtures, at the layers where it is hardest."""

from functools import cache

import torch
from transformers import PreTrainedModel

from kvsharer_exp.model.branch import find_branches
from kvsharer_exp.model.fitted_plan import Fit, FittedPlan
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.values.plan import KVPlan

# Sliding and full layers alternate in some models, and a layer reads only its own kind.
PLANS = {
    "quantised": "0q4g8_1q4g8s2_2q2g8_3q3g8s8_4q8g8_5q4g16s3",
    "readers of quantised": "0q3g8s1_1q4g8_0_1_0_1",
    "halves": "0_1_2k0v_3_0k4v_5k3v",
    "halves of quantised": "0q4g8s1_1q3g8_2k0v_1k3v_4_5q2g8",
    "stand-ins": "x_a_2_c_4_a",
    "all but one": "c_x_a_3_x_x",
    "all but one quantised": "x_a_2q4g8s2_c_x_a",
    "without even layers": "x_1_a_3_c_1",
    "without odd layers": "0_x_2_a_0_c",
    "windows": "0w2+5_1w0+4_0_1_4w6+3_5w3+1",
    "quantised windows": "0q4g8w2+5_1q3g8w8+3_0_1_4q2g8w0+4_5q8g16w5+7",
    "everything": "a_1q4g8s4_x_1_4w2+5_1k1v",
}


def fitted(model: PreTrainedModel, text: str, seed: int = 0) -> FittedPlan:
    """The plan ``text`` with random numbers; norms after attention are replaced in odd layers."""
    plan = KVPlan.parse(text)
    hidden = model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    fits = {}
    for layer, action in enumerate(plan.actions):
        if action.fitted:
            weight = torch.randn(hidden, hidden, generator=generator) / hidden**0.5
            bias = torch.randn(hidden, generator=generator)
            norm = norms(model)[layer] if layer % 2 else None
            fits[layer] = Fit({"weight": weight, "bias": bias}, norm)
    return FittedPlan(plan, fits)


@cache
def norms(model: PreTrainedModel) -> tuple[str | None, ...]:
    return tuple(branch.norm for branch in find_branches(model, attention_layers(model)))
