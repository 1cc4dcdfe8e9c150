"""Caches and weights that leave the GPU, and caches that quantise, under a plan."""

import importlib.util

import pytest
import torch
from accelerate import cpu_offload
from transformers import QuantizedCache

from kvsharer_exp.model.sharing.cache import cache_bytes
from kvsharer_exp.model.sharing.runtime import apply_plan, share_kv
from tests.gpu.models import PLANS, apart, llama_on, plan
from tests.tiny import some_map, tokens

pytestmark = pytest.mark.gpu


def answer(model, ids: torch.Tensor, **more) -> torch.Tensor:
    """A greedy answer; the second row of ``ids`` is padded on the left."""
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    return model.generate(ids, attention_mask=mask, **options, **more)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", ["dynamic", "offloaded", "static", "offloaded_static"])
def test_an_answer_is_that_of_a_search_without_cache(kind: str, name: str, device) -> None:
    if kind.startswith("offloaded") and device.type != "cuda":
        pytest.skip("an offloaded cache needs CUDA streams: no rehearsal on the CPU")
    if kind.endswith("static") and name == "q4":
        pytest.skip("a static cache cannot hold quantised layers; the refusal has its own test")
    model, ids = llama_on(device), tokens().to(device)
    if kind.endswith("static"):  # what is compiled has its own test
        model.generation_config.disable_compile = True
    with apply_plan(model, plan(name)):
        cached = answer(model, ids, cache_implementation=kind)
        assert torch.equal(cached, answer(model, ids, use_cache=False))


@pytest.mark.parametrize("name", PLANS)
def test_weights_that_wait_on_the_cpu(name: str, device: torch.device) -> None:
    """accelerate brings the weights of a layer when it runs, as where the model is too large."""
    ids = tokens().to(device)
    model, offloaded = llama_on(device), llama_on(torch.device("cpu"))
    cpu_offload(offloaded, execution_device=device)
    with apply_plan(model, plan(name)):
        expected = model(ids).logits
    with apply_plan(offloaded, plan(name)):
        got = offloaded(ids).logits
    assert apart(got, expected) < 1e-5
    assert apart(offloaded(ids).logits, model(ids).logits) < 1e-5


@pytest.mark.parametrize("backend", ["fp8", "quanto", "hqq"])
def test_a_cache_that_quantises_holds_the_owners_only(backend: str, device: torch.device) -> None:
    package = {"quanto": "optimum", "hqq": "hqq"}.get(backend)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    more = {} if package is None else {"q_group_size": 16}
    model, ids = llama_on(device), tokens(2, 40).to(device)
    sharing_map = some_map(model, 3)
    full, shared = (QuantizedCache(backend, model.config, **more) for _ in range(2))
    model(ids, past_key_values=full)
    stock = model(ids, use_cache=False).logits
    with share_kv(model, sharing_map):
        exact = model(ids, use_cache=False).logits
        model(ids[:, :-1], past_key_values=shared)
        decoded = model(ids[:, -1:], past_key_values=shared).logits
    assert apart(decoded, exact[:, -1:]) < 0.3 * apart(stock[:, -1:], exact[:, -1:])
    again = QuantizedCache(backend, model.config, **more)
    with share_kv(model, sharing_map):
        model(ids, past_key_values=again)
    assert cache_bytes(again) * 2 == cache_bytes(full) > 0
