"""What `bench` says of memory is counted on caches that exist; of speed it only promises a form."""

import copy

import pytest
import torch

from kvsharer_exp.measure.benchmark import check_length, counted_projections, measure
from kvsharer_exp.measure.prediction import calculate, kv_bytes_per_sequence, largest_batch, predict
from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.cache import cache_bytes
from kvsharer_exp.model.sharing.runtime import share_kv
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap
from tests.tiny import NUM_LAYERS, hooks, some_map, tiny_model, tokens

# mistral: every layer slides; gemma: every other does, window 8; the rest: none does.
NAMES = ("llama", "mistral", "gemma3_text", "phi3", "gpt2")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("context", [5, 20])
def test_predicted_kv_bytes_are_those_a_cache_holds(name: str, context: int) -> None:
    model = tiny_model(name)
    sharing_map = some_map(model, 2)
    predicted = predict(model, sharing_map, batch=3, context=context)["kv_bytes"]
    ids = tokens(3, context)
    with torch.inference_mode():
        assert cache_bytes(model(ids, use_cache=True).past_key_values) == predicted["full"]
        with share_kv(model, sharing_map):
            cache = model(ids, use_cache=True).past_key_values
    assert cache_bytes(cache) == predicted["shared"] < predicted["full"]


def test_the_prediction_of_a_llama_by_hand() -> None:
    model = tiny_model("llama")  # float64, hidden 64, 2 KV heads of 16
    sharing_map = SharingMap((0, 1, 2, 0, 1, 5))
    batch, context, hidden, features, size = 2, 10, 64, 2 * 32, 8
    held = batch * context * features * size
    predicted = predict(model, sharing_map, batch=batch, context=context)
    assert predicted["kv_bytes"] == {"full": 6 * held, "shared": 4 * held}
    assert predicted["kv_fraction"] == pytest.approx(4 / 6)
    assert predicted["kv_projection_flops_saved_per_token"] == 2 * (2 * hidden * features)
    assert predicted["kv_projection_flops_saved_in_prefill"] == batch * context * 4 * 64 * 64
    saved = footprint(model, sharing_map).parameter_bytes_saved
    assert predicted["kv_weight_bytes_saved"] == saved == 2 * hidden * features * size
    reads = predicted["attention_read_bytes_per_step"]
    assert reads["full"] == reads["shared"] == 6 * held
    assert predicted["concatenation_bytes_per_step"] == {"full": 12 * held, "shared": 8 * held}
    parameters = (
        sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    )
    moved = parameters * size + 18 * held
    assert predicted["decode_speedup"] == pytest.approx(moved / (moved - saved - 4 * held))
    assert predicted["prefill_speedup"] > 1


def test_the_identity_map_is_predicted_to_change_nothing() -> None:
    predicted = predict(tiny_model("qwen3"), SharingMap.identity(NUM_LAYERS), batch=1, context=9)
    assert predicted["decode_speedup"] == predicted["prefill_speedup"] == 1
    assert predicted["kv_bytes"]["full"] == predicted["kv_bytes"]["shared"]


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_measured_cells_count_what_ran_and_what_is_held(name: str) -> None:
    model = copy.deepcopy(tiny_model(name))
    sharing_map, before = some_map(model, 2), hooks(model)
    cell = measure(model, sharing_map, batch=2, context=6, new_tokens=3, repeats=2)
    assert (cell["new_tokens"], cell["repeats"]) == (3, 2)
    full, shared = cell["full"], cell["shared"]
    per_token = footprint(model, sharing_map).kv_bytes_per_token
    assert shared["cache_bytes"] == 2 * (6 + 3) * per_token
    assert full["cache_bytes"] * 4 == shared["cache_bytes"] * 6
    # One prefill and three steps, two targets: of each the fused, or the key and the value map.
    assert full["kv_projection_calls"] == 4 * 2 * (1 if name == "phi3" else 2)
    assert shared["kv_projection_calls"] == 0
    # What the prefill allocated at once holds its cache, and little else differs.
    held = 2 * 6 * per_token
    assert shared["prefill_peak_bytes"] >= held
    saved = full["prefill_peak_bytes"] - shared["prefill_peak_bytes"]
    assert saved == pytest.approx(held * 6 / 4 - held, rel=0.5)
    for side in (full, shared):
        for key in ("prefill_seconds", "decode_tokens_per_second", "resident_bytes"):
            assert 0 <= side[key]["min"] <= side[key]["median"] <= side[key]["max"]
    ratio = full["prefill_seconds"]["median"] / shared["prefill_seconds"]["median"]
    assert cell["speedup"]["prefill"] == ratio
    assert hooks(model) == before


def test_full_and_shared_take_turns_in_every_forward() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    sharing_map, seen = some_map(model), []
    target = attention_layers(model)[sharing_map.targets[0]]

    def note(module: object, args: object, kwargs: dict) -> None:
        sharing = not isinstance(target.attention.k_proj, torch.nn.Linear)
        seen.append(("shared" if sharing else "full", kwargs["input_ids"].shape[1]))

    model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    measure(model, sharing_map, batch=1, context=4, new_tokens=2, repeats=3)
    # The warm-up and three rounds; who goes first changes from round to round.
    first, second = ["full", "shared"], ["shared", "full"]
    assert [side for side, _ in seen] == first * (4 + 3) + second * 3 + first * 3
    assert [length for _, length in seen[-6:]] == [4, 4, 1, 1, 1, 1]
    assert len(seen) == 2 * ((1 + 3) + 3 * (1 + 2))  # a warm-up of three steps, three rounds


def test_the_projection_counter_goes_away_after_an_error() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    before = hooks(model)
    with pytest.raises(RuntimeError), counted_projections(model, some_map(model)):
        raise RuntimeError
    assert hooks(model) == before
    k_proj = attention_layers(model)[5].projection("k_proj")
    assert not k_proj._forward_hooks


def test_the_calculator_agrees_with_a_map() -> None:
    model = tiny_model("llama")
    sharing_map = some_map(model, 2)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    size, full = (footprint(model, m) for m in (sharing_map, SharingMap.identity(NUM_LAYERS)))
    memory = weights + 25 * full.kv_bytes_per_token
    row = calculate(model, 2, batch=3, context=10, memory_bytes=memory)
    assert row["exact"]
    assert row["kv_bytes"]["full"] == 30 * full.kv_bytes_per_token
    assert row["kv_bytes"]["shared"] == 30 * size.kv_bytes_per_token
    assert row["kv_bytes_saved"] == row["kv_bytes"]["full"] - row["kv_bytes"]["shared"]
    assert row["kv_weight_bytes_saved"] == size.parameter_bytes_saved
    room = 25 * full.kv_bytes_per_token + size.parameter_bytes_saved
    assert row["largest_batch"] == {"full": 2, "shared": room // (10 * size.kv_bytes_per_token)}


def test_the_calculator_says_when_layers_are_not_alike() -> None:
    model = tiny_model("gemma3_text")
    row = calculate(model, 3, batch=1, context=20, memory_bytes=2**30)
    layers = attention_layers(model)
    held = sum(kv_bytes_per_sequence(layer, 20) for layer in layers)
    assert not row["exact"]
    assert row["kv_bytes"] == {"full": held, "shared": round(held / 2)}


def test_no_batch_fits_where_the_weights_do_not() -> None:
    assert largest_batch(100, 101, 10) == largest_batch(109, 100, 10) == 0
    assert largest_batch(130, 100, 10) == 3


def test_more_tokens_than_positions_are_refused() -> None:
    model = tiny_model("llama")
    check_length(model, 256, "context")
    with pytest.raises(InputError, match=r"context is 257 tokens.*max_position_embeddings=256"):
        check_length(model, 257, "context")


@pytest.mark.parametrize("text", ["0q4g8s4", "0h8", "0q3g8snap0.5+4"])
def test_predicted_bytes_are_measured_after_the_new_tokens_too(text: str) -> None:
    model = tiny_model("llama")
    plan = KVPlan.parse("_".join(text.replace("0", str(i), 1) for i in range(NUM_LAYERS)))
    size = {"batch": 2, "context": 21, "new_tokens": 5}
    measured, predicted = measure(model, plan, **size, repeats=1), predict(model, plan, **size)
    for side in ("full", "shared"):
        assert measured[side]["cache_bytes"] == predicted["kv_bytes"][side]
    assert predicted["kv_fraction"] < 1


def test_a_decode_step_writes_one_quantised_layer_out_at_a_time() -> None:
    """The cache is smaller, and beside it a step needs the keys and values of one layer in full."""
    model = tiny_model("llama")
    plan = KVPlan.parse("_".join(f"{i}q4g8" for i in range(NUM_LAYERS)))
    batch, context = 4, 128
    cell = measure(model, plan, batch=batch, context=context, new_tokens=1, repeats=1)
    one_layer = batch * context * 2 * 32 * 8  # 2 KV heads of 16 in float64
    assert cell["shared"]["cache_bytes"] < 2 * one_layer
    assert one_layer <= cell["shared"]["decode_peak_bytes"] < 4 * one_layer
    # The full cache is copied half by half.
    assert one_layer / 2 <= cell["full"]["decode_peak_bytes"] < 4 * one_layer
