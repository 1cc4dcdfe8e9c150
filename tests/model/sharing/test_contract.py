"""The contract of running under a map, over architectures × maps × forms (the golden tests every
engine that shares KV learned the hard way)."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.model.sharing.architectures import WORKING, attention_layers
from kvsharer_exp.model.sharing.cache import cache_bytes
from kvsharer_exp.model.sharing.runtime import share_kv
from kvsharer_exp.values.sharing_map import SharingMap
from tests.tiny import (
    ARCHITECTURES,
    NUM_LAYERS,
    contract_architectures,
    hooks,
    running,
    some_map,
    tiny_model,
    tokens,
)

pytestmark = pytest.mark.usefixtures("inference")
IDENTITY = SharingMap.identity(NUM_LAYERS)


@pytest.fixture(params=contract_architectures())
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture(
    params=[("context", 1), ("context", 3), ("permanent", 3)], ids=lambda way: f"{way[0]}-{way[1]}"
)
def way(request: pytest.FixtureRequest) -> tuple[str, int]:
    return request.param


@pytest.fixture
def form(way: tuple[str, int]) -> str:
    return way[0]


@pytest.fixture
def sharing_map(way: tuple[str, int], model: PreTrainedModel) -> SharingMap:
    made = some_map(model, way[1])
    assert len(made.targets) == way[1]
    return made


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


def logits(model: PreTrainedModel, ids: torch.Tensor, **options: object) -> torch.Tensor:
    return model(ids, **options).logits


def test_the_list_of_those_that_work_is_this_registry() -> None:
    assert set(WORKING.split()) == set(ARCHITECTURES)


def test_identity_is_bit_equal_to_the_stock_model(model: PreTrainedModel) -> None:
    ids = tokens()
    stock = logits(model, ids)
    before = hooks(model)
    with share_kv(model, IDENTITY):
        assert hooks(model) == before
        assert torch.equal(logits(model, ids), stock)


def test_a_map_changes_logits_with_and_without_cache(model, sharing_map, form) -> None:
    ids = tokens()
    stock = logits(model, ids)
    with running(model, sharing_map, form) as shared:
        cached, uncached = logits(shared, ids, use_cache=True), logits(shared, ids, use_cache=False)
    assert torch.equal(cached, uncached)
    assert (cached - stock).abs().max() > 1e-3


def test_stepwise_equals_one_shot(model, sharing_map, form) -> None:
    ids = tokens()
    with running(model, sharing_map, form) as shared:
        one_shot = logits(shared, ids, use_cache=False)
        cache, steps = None, []
        for part in (ids[:, :11], *ids[:, 11:].split(1, dim=1)):
            output = shared(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), one_shot, rtol=1e-5, atol=1e-5)


def test_left_padded_batch_equals_each_row_alone(model, sharing_map, form) -> None:
    long, short = tokens(1, 20), tokens(1, 13, seed=1)
    pad = torch.zeros(1, 7, dtype=torch.long)
    batch = torch.cat([long, torch.cat([pad, short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with running(model, sharing_map, form) as shared:
        batched = logits(shared, batch, attention_mask=mask, position_ids=positions)
        alone = logits(shared, long), logits(shared, short)
    torch.testing.assert_close(batched[:1], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batched[1:, 7:], alone[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_equals_a_search_without_cache(model, sharing_map, form, beams: int) -> None:
    ids = tokens()
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    options["attention_mask"] = torch.ones_like(ids)
    with running(model, sharing_map, form) as shared:
        cached = shared.generate(ids, use_cache=True, **options)
        uncached = shared.generate(ids, use_cache=False, **options)
    assert cached.shape[1] > ids.shape[1]
    assert torch.equal(cached, uncached)


def test_the_cache_holds_exactly_the_predicted_bytes(model, sharing_map, form) -> None:
    ids = tokens(length=6)  # shorter than every sliding window
    size = footprint(model, sharing_map, context=6)
    with running(model, sharing_map, form) as shared:
        own = shared(ids, use_cache=True).past_key_values
        given = DynamicCache(config=model.config)
        shared(ids, past_key_values=given)
        bare = DynamicCache()
        shared(ids, past_key_values=bare)
        generated = shared.generate(
            ids, max_new_tokens=1, return_dict_in_generate=True, do_sample=False
        ).past_key_values
    for cache in (own, given, bare, generated):
        assert cache_bytes(cache) == size.kv_bytes * len(ids)
        assert cache_bytes(cache) == size.kv_bytes_per_token * ids.numel()
    full = footprint(model, IDENTITY, context=6)
    assert size.kv_fraction == size.kv_bytes_per_token / full.kv_bytes_per_token
    assert size.kv_fraction == 1 - len(sharing_map.targets) / NUM_LAYERS


def test_target_projections_never_run(model, sharing_map, form) -> None:
    calls = []
    handles = [
        layer.projection(name).register_forward_hook(
            lambda module, args, output, index=layer.index: calls.append(index)
        )
        for layer in attention_layers(model)
        for name in layer.projections.stubs()
    ]
    try:
        with running(model, sharing_map, form) as shared:
            shared.generate(tokens(), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    finally:
        for handle in handles:
            handle.remove()
    assert set(calls) == set(sharing_map.owners)
    assert len(calls) == 2 * len(attention_layers(model)[0].projections.stubs()) * len(set(calls))


def test_targets_compute_queries_alone(model, sharing_map, form) -> None:
    """To the last multiplication, also where one map makes queries, keys and values."""

    def flops(of: PreTrainedModel) -> int:
        # Inference mode hides matrix products from the counter.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            FlopCounterMode(display=False) as counter,
        ):
            of(tokens(), use_cache=False)
        return counter.get_total_flops()

    layers = attention_layers(model)
    rows = sum(sum(layers[target].kv_shape[1:]) for target in sharing_map.targets)
    full = flops(model)
    with torch.inference_mode(False), running(model, sharing_map, form) as shared:
        assert full - flops(shared) == 2 * tokens().numel() * model.config.hidden_size * rows


def test_the_model_is_as_before_also_after_an_exception(model, sharing_map) -> None:
    ids = tokens()
    stock, state, before = logits(model, ids), dict(model.state_dict()), hooks(model)
    config = model.config.to_json_string()
    with pytest.raises(ZeroDivisionError), share_kv(model, sharing_map):
        logits(model, ids)
        raise ZeroDivisionError
    assert model.config.to_json_string() == config
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert hooks(model) == before  # also says that the stub projections are gone
    assert torch.equal(logits(model, ids), stock)
