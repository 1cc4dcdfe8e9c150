"""The contract of plans where numbers are computed on a GPU, in each dtype and attention.

The default run holds all architectures and plans to it in float64 on the CPU. Here one architecture
meets the kernels of CUDA, whose sums come in another order.
"""

import importlib.util

import pytest
import torch

from kvsharer_exp.model.actions.sizes import kv_bytes
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.cache import cache_bytes
from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.model.sharing.runtime import apply_plan
from tests.gpu.models import CLOSE, PLANS, apart, llama_on, plan
from tests.tiny import hooks, tokens

pytestmark = pytest.mark.gpu

FLASH = "flash_attention_2"


@pytest.fixture(params=["eager", "sdpa", FLASH])
def attention(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=CLOSE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def model(request: pytest.FixtureRequest, attention: str, device: torch.device):
    dtype: torch.dtype = request.param
    if attention == FLASH:
        if dtype == torch.float32:
            pytest.skip("flash-attention takes 16 bits only")
        if device.type != "cuda" or importlib.util.find_spec("flash_attn") is None:
            pytest.skip("flash-attention needs CUDA and the package flash_attn")
    model = llama_on(device, dtype)
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("name", PLANS)
def test_one_shot_is_stepwise_and_all_is_undone(model, attention: str, name: str, device) -> None:
    ids = tokens(length=21).to(device)
    stock = model(ids).logits
    before = hooks(model), {key: value.clone() for key, value in model.state_dict().items()}
    fitted, layers = plan(name), attention_layers(model)
    if name == "q4" and attention == FLASH:
        with apply_plan(model, fitted), pytest.raises(SharingError, match="cannot mask"):
            model(ids)
    else:
        with apply_plan(model, fitted):
            one_shot = model(ids, use_cache=False).logits
            cache, steps = None, []
            for part in ids.split([11, *[1] * 10], dim=1):
                output = model(part, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                steps.append(output.logits)
                seen = int(cache.get_seq_length())
                predicted = kv_bytes(fitted.plan, layers, seen, model.dtype.itemsize) * len(ids)
                assert cache_bytes(cache) == predicted
        assert seen == 21
        assert apart(torch.cat(steps, 1), one_shot) < CLOSE[model.dtype] < apart(one_shot, stock)
    assert torch.equal(model(ids).logits, stock)
    assert hooks(model) == before[0]
    assert all(torch.equal(value, before[1][key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", PLANS)
def test_the_logits_are_those_of_the_cpu(name: str, device: torch.device) -> None:
    """In float32 a GPU computes what float64 on a CPU does, up to rounding and a few codes."""
    ids, exact = tokens(), llama_on(torch.device("cpu"), torch.float64)
    model = llama_on(device)
    with apply_plan(exact, plan(name)):
        expected = exact(ids).logits
    with apply_plan(model, plan(name)):
        got = model(ids.to(device)).logits
    assert apart(got, expected) < (0.02 if name == "q4" else 1e-4)
