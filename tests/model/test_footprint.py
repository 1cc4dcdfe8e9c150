"""The FLOPs of attention, against those that PyTorch counts when a model decodes one token."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.model.sharing.runtime import apply_plan
from kvsharer_exp.values.plan import KVPlan
from tests.model.actions.plans import fitted
from tests.tiny import tiny_model, tokens

CONTEXT = 19
PLANS = {
    "full": "0_1_2_3_4_5",
    "map": "0_1_0_1_0_5",
    "stand-ins": "0_a_2_c_4_x",
    "halves": "0_1_2_3_2k0v_5",
}


def flops_of_attentions(model, plan) -> int:
    """What is multiplied in the attentions, or their stand-ins, for one token after `CONTEXT`."""
    ids = tokens(1, CONTEXT + 1)
    with torch.inference_mode(), apply_plan(model, plan):
        cache = DynamicCache(config=model.config)
        model(ids[:, :-1], past_key_values=cache)
        with FlopCounterMode(display=False) as counter:
            model(ids[:, -1:], past_key_values=cache)
    counts = counter.get_flop_counts()
    return sum(
        sum(counted.values()) for name, counted in counts.items() if name.endswith("self_attn")
    )


@pytest.mark.parametrize("text", PLANS.values(), ids=list(PLANS))
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3"])
def test_attention_flops_are_those_of_a_decoded_token(name: str, text: str) -> None:
    model = tiny_model(name)
    model.set_attn_implementation("eager")  # whose products PyTorch counts one by one
    try:
        plan = fitted(model, text)
        counted = flops_of_attentions(model, plan)
    finally:
        model.set_attn_implementation("sdpa")
    size = footprint(model, plan.plan, context=CONTEXT)
    # Norms of queries and keys, and biases, are weights that PyTorch does not count.
    assert counted <= size.attention_flops <= 1.006 * counted
    if name == "llama" and "a" not in text:
        assert size.attention_flops == counted
    assert size.context == CONTEXT


def test_less_attention_takes_fewer_flops() -> None:
    model = tiny_model("llama")
    full, read, drop = (
        footprint(model, KVPlan.parse(text)).attention_flops
        for text in ("0_1_2_3_4_5", "0_0_2_3_4_5", "0_x_2_3_4_5")
    )
    assert drop == full * 5 // 6 < read < full
