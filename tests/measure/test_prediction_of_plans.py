"""What `predict` says of plans is what caches hold, what models lose, and what hooks count."""

import copy

import pytest
import torch

from kvsharer_exp.measure.benchmark import counted_projections, measure
from kvsharer_exp.measure.fits import fit_plan
from kvsharer_exp.measure.prediction import predict
from kvsharer_exp.model.sharing.cache import cache_bytes
from kvsharer_exp.model.sharing.permanent import make_plan
from kvsharer_exp.model.sharing.runtime import apply_plan
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap
from tests.tiny import hooks, tiny_model, tokens

PLAN = KVPlan.parse("0_1q4s4_0k1v_x_c_a")
HALF = KVPlan.parse("0_1_2_0k3v_4q8g8_4")
FIT_TEXT = tokens(8, 24, seed=3)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("context", [5, 40])
@pytest.mark.parametrize("plan", [PLAN, HALF], ids=str)
def test_kv_bytes_are_those_a_cache_holds(name: str, context: int, plan: KVPlan) -> None:
    model = tiny_model(name)
    predicted = predict(model, plan, batch=3, context=context)
    with apply_plan(model, fit_plan(model, plan, FIT_TEXT)), torch.inference_mode():
        cache = model(tokens(3, context), use_cache=True).past_key_values
    assert cache_bytes(cache) == predicted["kv_bytes"]["shared"]
    assert predicted["kv_fraction"] == cache_bytes(cache) / predicted["kv_bytes"]["full"]


def size_of(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def test_parameter_bytes_are_those_a_model_loses() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    predicted = predict(model, PLAN, batch=1, context=8)["kv_weight_bytes_saved"]
    changed = make_plan(model, fit_plan(tiny_model("llama"), PLAN, FIT_TEXT))
    assert changed.parameter_bytes_saved == predicted > 0


def test_the_prediction_of_a_llama_by_hand() -> None:
    model = tiny_model("llama")  # float64, hidden 64, 4 heads, 2 KV heads of 16
    batch, context, hidden, size = 2, 40, 64, 8
    half = batch * context * 32 * size  # the keys or the values of one layer
    got = predict(model, PLAN, batch=batch, context=context)
    # stand-ins read nothing; the others read all numbers, whoever keeps them and however
    assert got["attention_read_bytes_per_step"] == {"full": 12 * half, "shared": 6 * half}
    kept = got["kv_bytes"]["shared"]
    assert got["concatenation_bytes_per_step"] == {"full": 24 * half, "shared": 2 * kept}
    # the quantised layer: its codes are read, its numbers written
    codes = kept - 2 * half
    assert got["dequantisation_bytes_per_step"] == {"full": 0, "shared": codes + 2 * half}
    projections = 2 * hidden * 64 * batch * context  # of the reader
    assert got["kv_projection_flops_saved_in_prefill"] == projections
    attention = hidden * hidden * 2 + hidden * 32 * 2  # the weights of one
    weights = 3 * attention - hidden - hidden * (hidden + 1)  # less the constant and the affine
    products = 3 * 4 * 32 * batch * context**2
    assert got["flops_saved_in_prefill"] == projections + 2 * weights * batch * context + products
    saved = (2 * hidden * 32 + weights) * size
    assert got["kv_weight_bytes_saved"] == saved
    parameters = size_of(model) - model.model.embed_tokens.weight.numel() * size
    moved = parameters + 36 * half
    shared = parameters - saved + 6 * half + 2 * kept + codes + 2 * half
    assert got["decode_speedup"] == pytest.approx(moved / shared)
    assert got["prefill_speedup"] > 1


def test_a_map_is_predicted_as_the_plan_that_it_is() -> None:
    model, sharing_map = tiny_model("gemma3_text"), SharingMap((0, 1, 0, 1, 4, 5))
    assert predict(model, sharing_map, batch=2, context=20) == predict(
        model, KVPlan.of(sharing_map), batch=2, context=20
    )


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_no_projection_runs_that_a_plan_does_without(name: str) -> None:
    model = copy.deepcopy(tiny_model(name))
    before = hooks(model)
    fitted = fit_plan(model, PLAN, FIT_TEXT)
    cell = measure(model, fitted, batch=2, context=40, new_tokens=2, repeats=1)
    # One prefill and three steps; four layers make neither keys nor values.
    each = 1 if name == "phi3" else 2
    assert cell["full"]["kv_projection_calls"] == 4 * 4 * each
    assert cell["shared"]["kv_projection_calls"] == 0
    predicted = predict(model, PLAN, batch=2, context=42)["kv_bytes"]["shared"]
    assert cell["shared"]["cache_bytes"] == predicted
    assert hooks(model) == before


def test_of_a_half_owner_only_the_other_half_is_counted() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    with counted_projections(model, HALF) as seen, torch.inference_mode():
        model(tokens(1, 4))
    assert seen == ["3.k_proj", "5.k_proj", "5.v_proj"]
    fused = copy.deepcopy(tiny_model("phi3"))
    with counted_projections(fused, HALF) as seen, torch.inference_mode():
        fused(tokens(1, 4))
    assert seen == ["5.qkv_proj"]
