"""What `share_kv` refuses, and its three parts one at a time."""

import threading

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from kvsharer_exp.sharing.architectures import SharingError
from kvsharer_exp.sharing.cache import SourceView, TargetView, cache_bytes
from kvsharer_exp.sharing.runtime import NoProjection, share_kv
from kvsharer_exp.sharing_map import SharingMap
from tests.tiny import NUM_LAYERS, SMALL, some_map, tiny_model, tokens

MAP = SharingMap.identity(NUM_LAYERS).share(4, 1)


def key_value(seed: int, length: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2, length, 4)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_substitution_gives_the_target_its_sources_kv() -> None:
    shared, cache = {}, DynamicCache()
    source, target = SourceView(cache, shared), TargetView(cache, shared, source=0, last=True)
    first = source.update(*key_value(0), 0)
    assert target.update(*key_value(1), 3) == first
    assert shared == {}  # dropped after its last reader
    grown = source.update(*key_value(2, length=1), 0)
    read = TargetView(cache, shared, source=0, last=False).update(*key_value(3), 3)
    assert read == grown
    assert grown[0].shape[-2] == 4
    assert 0 in shared


def test_substitution_works_without_a_cache() -> None:
    shared = {}
    given = key_value(0)
    assert SourceView(None, shared).update(*given, 0) == given
    assert TargetView(None, shared, source=0, last=True).update(*key_value(1), 1) == given


def test_a_target_stores_nothing() -> None:
    shared, cache = {}, DynamicCache()
    SourceView(cache, shared).update(*key_value(0), 0)
    before = cache_bytes(cache)
    TargetView(cache, shared, source=0, last=False).update(*key_value(1), 1)
    assert cache_bytes(cache) == before == 2 * 2 * 2 * 3 * 4 * 4


def test_a_view_shows_the_cache_behind_it() -> None:
    cache = DynamicCache()
    view = SourceView(cache, {})
    view.update(*key_value(0), 0)
    assert view.get_seq_length() == cache.get_seq_length() == 3
    assert view.layers is cache.layers
    assert SourceView(None, {}).get_seq_length() == 0


def test_no_projection_takes_no_memory() -> None:
    zeros = NoProjection(8)(torch.ones(2, 3, 4, dtype=torch.bfloat16))
    assert zeros.shape == (2, 3, 8)
    assert zeros.dtype == torch.bfloat16
    assert zeros.untyped_storage().nbytes() == 2
    assert not zeros.any()


def test_refuses_a_map_of_another_length() -> None:
    with pytest.raises(SharingError, match="map has 7 layers but the model has 6"):
        with share_kv(tiny_model("llama"), SharingMap.identity(7).share(6, 0)):
            pass


def test_refuses_sliding_against_full_attention() -> None:
    with pytest.raises(SharingError, match="layer 3 cannot read layer 2: full_attention against"):
        with share_kv(tiny_model("gemma3_text"), SharingMap.identity(NUM_LAYERS).share(3, 2)):
            pass


def test_refuses_another_kv_shape() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[4].self_attn
    narrow = nn.Linear(SMALL["hidden_size"], 16, bias=False)
    original, attention.k_proj = attention.k_proj, narrow
    try:
        with pytest.raises(SharingError, match="layer 4 cannot read layer 1: their KV shapes"):
            with share_kv(model, MAP):
                pass
    finally:
        attention.k_proj = original


def test_refuses_a_model_without_the_seam() -> None:
    small = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**small))
    with pytest.raises(SharingError, match=r"gpt2 cannot share KV here.*Works: llama"):
        with share_kv(model, SharingMap((0, 0))):
            pass


def test_refuses_attention_that_never_asks_the_cache() -> None:
    """A layer that looks right but ignores the cache would silently not share."""
    model = tiny_model("llama")
    attention = model.model.layers[4].self_attn
    stock = type(attention).forward

    class Deaf(type(attention)):  # type: ignore[misc]
        def forward(self, *args, past_key_values=None, **kwargs):
            return stock(self, *args, past_key_values=None, **kwargs)

    original, attention.__class__ = type(attention), Deaf
    try:
        with pytest.raises(RuntimeError, match=r"layer 4 .* does not call cache.update"):
            with torch.inference_mode(), share_kv(model, MAP):
                model(tokens())
    finally:
        attention.__class__ = original


def test_refuses_to_nest_and_stays_usable() -> None:
    model = tiny_model("llama")
    with share_kv(model, MAP):
        with pytest.raises(SharingError, match="already running under a map"):
            with share_kv(model, MAP):
                pass
        with torch.inference_mode():
            first = model(tokens()).logits
    with torch.inference_mode(), share_kv(model, MAP):
        assert torch.equal(model(tokens()).logits, first)


def test_refuses_a_second_thread() -> None:
    model = tiny_model("llama")
    errors: list[Exception] = []

    def use() -> None:
        for attempt in (lambda: model(tokens()), lambda: share_kv(model, MAP).__enter__()):
            try:
                attempt()
            except SharingError as error:
                errors.append(error)

    with torch.inference_mode(), share_kv(model, MAP):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    assert [str(error).count("another thread") for error in errors] == [1, 1]


def test_many_readers_of_one_source_and_a_reader_of_layer_zero() -> None:
    model = tiny_model("qwen2")
    wide = SharingMap((0, 0, 0, 3, 3, 0))
    with torch.inference_mode(), share_kv(model, wide):
        output = model(tokens(), use_cache=True)
        again = model(tokens(), use_cache=False)
    assert torch.equal(output.logits, again.logits)
    held = [i for i, layer in enumerate(output.past_key_values.layers) if layer.is_initialized]
    assert held == [0, 3]


def test_a_map_of_a_trained_sharing_model_is_refused() -> None:
    model = tiny_model("llama")
    model.config.num_kv_shared_layers = 2
    try:
        with pytest.raises(SharingError, match="already shares KV"):
            with share_kv(model, some_map(tiny_model("qwen2"))):
                pass
    finally:
        del model.config.num_kv_shared_layers
