"""Every kind of cache under a map: the tokens of a search without one, and exactly the bytes of the
owners, counted on the tensors."""

import copy
import importlib.util

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, StaticCache
from transformers.generation import CompileConfig

from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.cache import cache_bytes
from kvsharer_exp.model.sharing.runtime import share_kv
from kvsharer_exp.values.sharing_map import SharingMap
from tests.tiny import running, some_map, tiny_model, tokens

NEW = 8


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(params=["llama", "gemma3_text", "mistral", "gpt_neox"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture(params=["context", "permanent"])
def shared(request: pytest.FixtureRequest, model: PreTrainedModel, sharing_map: SharingMap):
    with running(model, sharing_map, request.param) as shared:
        yield shared


@pytest.fixture
def sharing_map(model: PreTrainedModel) -> SharingMap:
    return some_map(model, 3)


def generate(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, **more):
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    options["attention_mask"] = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, return_dict_in_generate=True, **{**options, **more})


def expected_bytes(
    model: PreTrainedModel, sharing_map: SharingMap, length: int, window: int | None = None
) -> int:
    """Of one row of the batch when full layers hold ``length`` and sliding ones ``window``."""
    layers = attention_layers(model)
    sliding = getattr(model.config, "sliding_window", None)
    held = {owner: length for owner in sharing_map.owners}
    if sliding is not None:
        everywhere = getattr(model.config, "layer_types", None) is None
        for owner in held:
            if everywhere or layers[owner].attention_type == "sliding_attention":
                held[owner] = min(length, sliding if window is None else window)
    return sum(layers[owner].kv_bytes_per_token * n for owner, n in held.items())


def test_dynamic(model, shared, sharing_map) -> None:
    ids = tokens()
    output = generate(shared, ids)
    assert torch.equal(output.sequences, generate(shared, ids, use_cache=False).sequences)
    window = (getattr(model.config, "sliding_window", None) or 1) - 1
    expected = expected_bytes(model, sharing_map, ids.shape[1] + NEW - 1, window)
    assert cache_bytes(output.past_key_values) == len(ids) * expected


def test_static_made_by_generate_also_left_padded(model, shared, sharing_map) -> None:
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :7], ids[1, :7] = 0, 0
    output = generate(shared, ids, mask, cache_implementation="static")
    uncached = generate(shared, ids, mask, use_cache=False)
    assert torch.equal(output.sequences, uncached.sequences)
    cache = output.past_key_values
    assert isinstance(cache, StaticCache)
    expected = expected_bytes(model, sharing_map, ids.shape[1] + NEW - 1)
    assert cache_bytes(cache) == len(ids) * expected


@pytest.mark.parametrize("early", [False, True], ids=["lazy", "allocated-before"])
def test_static_made_by_hand(model, shared, sharing_map, early: bool) -> None:
    ids = tokens()
    one_shot = shared(ids, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=32)
    if early:
        heads, features, _ = attention_layers(model)[0].kv_shape
        cache.early_initialization(len(ids), heads, features // heads, model.dtype, model.device)
    steps = [
        shared(part, past_key_values=cache).logits
        for part in (ids[:, :11], *ids[:, 11:].split(1, dim=1))
    ]
    torch.testing.assert_close(torch.cat(steps, 1), one_shot, rtol=1e-5, atol=1e-5)
    assert cache_bytes(cache) == len(ids) * expected_bytes(model, sharing_map, 32)


def test_a_prefix_is_used_twice(shared) -> None:
    prefix, endings = tokens(1, 12), tokens(2, 5, seed=3)
    kept = shared(prefix, use_cache=True).past_key_values
    held = cache_bytes(kept)
    for ending in endings.split(1):
        whole = torch.cat([prefix, ending], 1)
        output = generate(shared, whole, past_key_values=copy.deepcopy(kept))
        assert torch.equal(output.sequences, generate(shared, whole, use_cache=False).sequences)
    assert cache_bytes(kept) == held


def test_crop_goes_back(model, shared, sharing_map) -> None:
    ids = tokens()
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    shared(ids[:, :12], past_key_values=cache)
    shared(tokens(seed=5)[:, :4], past_key_values=cache)  # a draft that is taken back
    cache.crop(-4)
    again = shared(ids[:, 12:], past_key_values=cache).logits
    torch.testing.assert_close(
        again, shared(ids, use_cache=False).logits[:, 12:], rtol=1e-5, atol=1e-5
    )
    cache.crop(-8)
    window = (getattr(model.config, "sliding_window", None) or 1) - 1
    assert cache_bytes(cache) == len(ids) * expected_bytes(model, sharing_map, 12, window)


@pytest.mark.parametrize("draft", ["assistant", "lookup"])
def test_assisted_decoding(shared, draft: str) -> None:
    ids = tokens(1)
    more = {"prompt_lookup_num_tokens": 3}
    if draft == "assistant":
        more = {"assistant_model": tiny_model("qwen2")}
    # The assistant is left as it is, whatever generate does to its settings.
    kept = copy.deepcopy(tiny_model("qwen2").generation_config)
    assisted = generate(shared, ids, **more).sequences
    tiny_model("qwen2").generation_config = kept
    assert torch.equal(assisted, generate(shared, ids, use_cache=False).sequences)


def test_assisted_by_itself_with_a_map_of_its_own() -> None:
    """Model and assistant each under a map, at once."""
    model, assistant, ids = tiny_model("llama"), copy.deepcopy(tiny_model("llama")), tokens(1)
    with share_kv(model, some_map(model, 2)):
        alone = generate(model, ids, use_cache=False).sequences
        with share_kv(assistant, some_map(assistant, 3)):
            assert torch.equal(generate(model, ids, assistant_model=assistant).sequences, alone)


def test_quantised_fp8() -> None:
    model, ids = tiny_model("llama"), tokens()
    sharing_map = some_map(model, 3)
    cache = QuantizedCache("fp8", model.config)
    with share_kv(model, sharing_map):
        exact = model(ids, use_cache=False).logits
        model(ids[:, :-1], past_key_values=cache)
        decoded = model(ids[:, -1:], past_key_values=cache).logits[:, 0]
    stock = model(ids, use_cache=False).logits
    # Eight bits are not exact, yet far nearer to the map than to the stock model.
    assert (decoded - exact[:, -1]).norm() < 0.2 * (stock - exact)[:, -1].norm()
    held = footprint(model, sharing_map).kv_bytes_per_token // model.dtype.itemsize * ids.numel()
    scales = 2 * 4 * len(sharing_map.owners)  # one float32 for keys, one for values
    assert cache_bytes(cache) == held + scales


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_quantised_by_groups(backend: str) -> None:
    package = {"quanto": "optimum", "hqq": "hqq"}[backend]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    model, ids = copy.deepcopy(tiny_model("llama")).float(), tokens(2, 40)
    full, shared = (QuantizedCache(backend, model.config, q_group_size=16) for _ in range(2))
    model(ids, past_key_values=full)
    sharing_map = some_map(model, 3)
    with share_kv(model, sharing_map):
        model(ids, past_key_values=shared)
    assert cache_bytes(shared) * 6 == cache_bytes(full) * 3 > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3_text"])
@pytest.mark.parametrize("form", ["context", "permanent"])
def test_compiled_static_decode(name: str, form: str) -> None:
    torch.compiler.reset()
    counters.clear()
    model, ids = copy.deepcopy(tiny_model(name)).float(), tokens()
    compiler = CompileConfig(fullgraph=True, mode="default")
    compiler._compile_all_devices = True
    with torch.inference_mode(False), torch.no_grad():
        with running(model, some_map(model, 3), form) as shared:
            plain = generate(shared, ids, use_cache=False).sequences
            compiled = generate(shared, ids, cache_implementation="static", compile_config=compiler)
    assert counters["stats"]["unique_graphs"] > 0
    assert torch.equal(compiled.sequences, plain)
