"""Plans of a model whose projections hold their weights in 8 bits."""

import copy

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from kvsharer_exp import KVPlan, apply_plan, fit_plan
from kvsharer_exp.measure.prediction import predict
from kvsharer_exp.model.actions.sizes import kv_bytes
from kvsharer_exp.model.footprint import footprint, measured_footprint
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.permanent import make_plan
from tests.tiny import tiny_model, tokens

PLAN = KVPlan.parse("0_a_2q4g8s2_c_2_5")


class EightBit(nn.Linear):
    """Weights in 8 bits with a scale for each output; computes in the dtype of its input.

    Packages that quantise put such layers in place of those of the model.
    """

    def __init__(self, full: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = full.in_features, full.out_features
        largest = torch.iinfo(dtype).max if dtype == torch.int8 else torch.finfo(dtype).max
        scale = full.weight.abs().amax(1, keepdim=True) / largest
        weight = full.weight / scale
        weight = weight.round() if dtype == torch.int8 else weight
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.scale = nn.Parameter(scale)
        self.bias = full.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(states.dtype) * self.scale.to(states.dtype)
        return nn.functional.linear(states, weight, self.bias)


@pytest.fixture(params=[torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = copy.deepcopy(tiny_model("llama")).bfloat16()
    for block in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            projection = getattr(block.self_attn, name)
            setattr(block.self_attn, name, EightBit(projection.float(), request.param))
    return model


@torch.inference_mode()
def test_a_plan_runs_in_the_dtype_of_the_model(model: PreTrainedModel) -> None:
    ids, layers = tokens(), attention_layers(model)
    fitted = fit_plan(model, PLAN, tokens(8, 16))
    stock = model(ids).logits
    with apply_plan(model, fitted):
        expected = model(ids, use_cache=False).logits
        assert torch.allclose(model(ids).logits, expected, atol=0.05)
    assert torch.equal(model(ids).logits, stock)
    held = measured_footprint(model, fitted, ids).cache_bytes
    assert held == kv_bytes(PLAN, layers, ids.shape[1]) * len(ids)
    make_plan(model, fitted)
    stand_in = model.model.layers[1].self_attn
    assert {weight.dtype for weight in stand_in.parameters()} == {torch.bfloat16}
    assert torch.equal(model(ids, use_cache=False).logits, expected)


def packed(full: nn.Linear) -> nn.Linear:
    """Two weights of 4 bits in each byte of its parameter, as bitsandbytes has them."""
    layer = nn.Linear(full.in_features, full.out_features, bias=full.bias is not None)
    half = torch.zeros(full.weight.numel() // 2, 1, dtype=torch.uint8)
    layer.weight = nn.Parameter(half, requires_grad=False)
    layer.scale = nn.Parameter(torch.ones(full.out_features, 1))
    return layer


def test_packed_weights_take_as_many_flops(model: PreTrainedModel) -> None:
    stock, plan = copy.deepcopy(tiny_model("llama")), KVPlan.parse("0_a_2_0k2v_2_c")
    in_four = copy.deepcopy(stock)
    for block in in_four.model.layers:
        for owner in (block.self_attn, block.mlp):
            for name, module in list(owner.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(owner, name, packed(module))
    expected = footprint(stock, plan).attention_flops
    size = {"batch": 2, "context": 8, "new_tokens": 2}
    saved = predict(stock, plan, **size)["prefill_speedup"]
    for quantised in (model, in_four):
        assert footprint(quantised, plan).attention_flops == expected
        assert predict(quantised, plan, **size)["prefill_speedup"] == saved
