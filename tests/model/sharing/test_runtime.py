"""What `share_kv` refuses, and its three parts one at a time."""

import cProfile
import threading
import weakref
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kvsharer_exp.model.sharing.architectures import SharingError, attention_layers
from kvsharer_exp.model.sharing.cache import LayerView, cache_bytes
from kvsharer_exp.model.sharing.exchange import Handed
from kvsharer_exp.model.sharing.projections import NoProjection
from kvsharer_exp.model.sharing.runtime import share_kv
from kvsharer_exp.values.sharing_map import SharingMap
from tests.tiny import NUM_LAYERS, SMALL, hooks, some_map, tiny_model, tokens

MAP = SharingMap.identity(NUM_LAYERS).share(4, 1)


def key_value(seed: int, length: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2, length, 4)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def source_of(cache: Any, handed: Handed, layer: int = 0) -> LayerView:
    return LayerView(cache, handed, None, sources=(layer, layer), hands_over=True)


def reader_of(cache: Any, handed: Handed, done: tuple[int, ...] = (), **options: Any) -> LayerView:
    options = {"sources": (0, 0), "hands_over": False, **options}
    return LayerView(cache, handed, options.pop("part", None), done=done, **options)


def test_substitution_gives_the_target_its_sources_kv() -> None:
    shared: Handed = {}
    cache = DynamicCache()
    source, target = source_of(cache, shared), reader_of(cache, shared, done=(0,))
    first = source.update(*key_value(0), 0)
    assert target.update(*key_value(1), 3) == first
    assert shared == {}  # dropped after its last reader
    grown = source.update(*key_value(2, length=1), 0)
    read = reader_of(cache, shared).update(*key_value(3), 3)
    assert read == grown
    assert grown[0].shape[-2] == 4
    assert 0 in shared


def test_substitution_works_without_a_cache() -> None:
    shared: Handed = {}
    given = key_value(0)
    assert source_of(None, shared).update(*given, 0) == given
    assert reader_of(None, shared, done=(0,)).update(*key_value(1), 1) == given


def test_keys_and_values_may_come_from_two_layers() -> None:
    shared: Handed = {}
    for layer in (0, 1):
        source_of(None, shared, layer).update(*key_value(layer), layer)
    read = reader_of(None, shared, sources=(0, 1)).update(*key_value(2), 2)
    assert read == (shared[0][None].key, shared[1][None].value)


def test_each_part_of_a_batch_reads_its_own_plans_source() -> None:
    shared: Handed = {}
    for layer in (0, 1):
        source_of(None, shared, layer).update(*key_value(layer), layer)
    for part in (0, 1):  # two rows: one for each of two plans
        reader = reader_of(None, shared, sources=(part, part), part=(part, 2))
        read = reader.update(*[half[:1] for half in key_value(2)], 2)
        for mine, whole in zip(read, key_value(part), strict=True):
            assert torch.equal(mine, whole[part : part + 1])


def test_a_target_stores_nothing() -> None:
    shared: Handed = {}
    cache = DynamicCache()
    source_of(cache, shared).update(*key_value(0), 0)
    before = cache_bytes(cache)
    reader_of(cache, shared).update(*key_value(1), 1)
    assert cache_bytes(cache) == before == 2 * 2 * 2 * 3 * 4 * 4


def test_a_view_shows_the_cache_behind_it() -> None:
    cache = DynamicCache()
    view = source_of(cache, {})
    view.update(*key_value(0), 0)
    assert view.get_seq_length() == cache.get_seq_length() == 3
    assert view.layers is cache.layers
    assert source_of(None, {}).get_seq_length() == 0


def test_no_projection_gives_zeros_that_may_be_written_into() -> None:
    """Public fault 19: OLMo clamps in place, and torch refuses that on an expanded tensor."""
    zeros = NoProjection(8)(torch.ones(2, 3, 4, dtype=torch.bfloat16))
    assert zeros.shape == (2, 3, 8)
    assert zeros.dtype == torch.bfloat16
    assert not zeros.any()
    zeros.clamp_(-1, 1)


@pytest.mark.parametrize("name", ["llama", "olmo"])
def test_a_targets_zeros_are_of_the_current_tokens_and_nobody_keeps_them(name: str) -> None:
    model = tiny_model(name)
    sharing_map = some_map(model, 1)
    (target,) = sharing_map.targets
    attention = attention_layers(model)[target].attention
    made: list[tuple[torch.Size, weakref.ref[torch.Tensor]]] = []

    def keep(_: Any, __: Any, zeros: torch.Tensor) -> None:
        made.append((zeros.shape, weakref.ref(zeros)))

    with torch.inference_mode(), share_kv(model, sharing_map):
        handle = attention.v_proj.register_forward_hook(keep)
        cache = model(tokens(2, 9), use_cache=True).past_key_values
        model(tokens(2, 1), past_key_values=cache)
        handle.remove()
        assert not list(attention.v_proj.state_dict())
    assert [tuple(shape[:2]) for shape, _ in made] == [(2, 9), (2, 1)]
    assert [zeros() for _, zeros in made] == [None, None]


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


WITHOUT_THE_SEAM = {
    "T5Config": ({"num_layers": 2, "d_model": 32, "d_kv": 8, "d_ff": 32}, "t5", "seq2seq"),
    "MambaConfig": ({"num_hidden_layers": 2, "hidden_size": 32}, "mamba", "recurrent"),
    "DeepseekV3Config": (
        {"num_hidden_layers": 2, "hidden_size": 32, "n_routed_experts": 8},
        "deepseek_v3",
        "latent KV",
    ),
    "Lfm2Config": (
        {"layer_types": ["conv", "full_attention"], "hidden_size": 64, "num_hidden_layers": 2},
        "lfm2",
        "recurrent",
    ),
}


@pytest.mark.parametrize("config", WITHOUT_THE_SEAM)
def test_refuses_a_model_without_the_seam(config: str) -> None:
    options, name, reason = WITHOUT_THE_SEAM[config]
    made = getattr(transformers, config)(vocab_size=64, **options)
    with torch.device("meta"):
        model = AutoModel.from_config(made)
    with pytest.raises(SharingError) as caught:
        with share_kv(model, SharingMap((0, 0))):
            pass
    message = str(caught.value)
    assert message.startswith(f"{name} cannot share KV ({reason}). Works: llama mistral ")
    assert len(message) <= 200


def model_of(config: str, **options: object) -> PreTrainedModel:
    small = {"num_hidden_layers": 6, "num_attention_heads": 4, "hidden_size": 64, "vocab_size": 128}
    made = getattr(transformers, config)(**small, **options)
    return AutoModelForCausalLM.from_config(made).eval()


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("CodeGenConfig", {"rotary_dim": 8}),
        ("FalconConfig", {}),
        ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        # GPTBigCode has one KV head: taken for four, the zeros would cover queries too.
        ("GPTBigCodeConfig", {"num_key_value_heads": None}),
    ],
)
def test_refuses_a_fused_projection_laid_out_otherwise_at_the_door(
    config: str, options: dict[str, object]
) -> None:
    """Known names with other rows in them passed until a map was tried, after ``calibrate``."""
    with pytest.raises(SharingError, match=r"^\w+ cannot share KV \(attention\)\. Works: llama"):
        attention_layers(model_of(config, **options))


def test_refuses_a_fused_projection_that_nothing_tells_apart() -> None:
    """Known names and sizes with other rows in them: seen at the first forward of a target."""
    model = model_of("CodeGenConfig", rotary_dim=8)
    model.config.model_type = "of-your-own"
    with pytest.raises(SharingError, match=r"layer 4 .* not laid out as queries, keys, values"):
        with torch.inference_mode(), share_kv(model, MAP):
            model(tokens())


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
        with pytest.raises(
            SharingError, match=r"layer 4 .* did not read its source.s KV through cache.update"
        ):
            with torch.inference_mode(), share_kv(model, MAP):
                model(tokens())
    finally:
        attention.__class__ = original


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_an_error_in_the_middle_of_a_forward_leaves_nothing(name: str, error: type) -> None:
    """Between a source and its target: KV is on its way and the targets have stubs."""
    model = tiny_model(name)
    attention = attention_layers(model)[3].attention

    def fail(module: nn.Module, args: object, output: object) -> None:
        raise error

    with torch.inference_mode():
        stock, before = model(tokens()).logits, hooks(model)
        state = dict(model.state_dict())
        with pytest.raises(error), share_kv(model, MAP):
            handle = attention.register_forward_hook(fail)
            try:
                model(tokens())
            finally:
                handle.remove()
        assert hooks(model) == before
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert torch.equal(model(tokens()).logits, stock)
        with share_kv(model, MAP):  # nothing of the broken forward is left for the next
            shared = model(tokens()).logits
        assert not torch.equal(shared, stock)


def test_a_forward_after_a_broken_one_inside_the_same_block() -> None:
    model = tiny_model("llama")
    with torch.inference_mode(), share_kv(model, MAP):
        expected = model(tokens()).logits
        handle = model.model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(tokens(seed=7))
        handle.remove()
        assert torch.equal(model(tokens()).logits, expected)


def test_a_cache_filled_under_a_map_is_not_taken_for_a_full_one() -> None:
    model, ids = tiny_model("llama"), tokens()
    with torch.inference_mode():
        with share_kv(model, MAP):
            cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(NotImplementedError):
            model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_entering_and_leaving_costs_a_few_hundred_calls_a_layer(name: str) -> None:
    """A few milliseconds, then; only the count is the same on every machine."""
    calls = {}
    for num_layers in (16, 32):
        model = tiny_model(name, num_hidden_layers=num_layers)
        sharing_map = some_map(model, 3 * num_layers // 8)
        with cProfile.Profile() as profile, share_kv(model, sharing_map):
            pass
        calls[num_layers] = sum(entry.callcount for entry in profile.getstats())
    assert calls[32] < 2.1 * calls[16]
    assert calls[32] < 420 * 32


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
    held = [i for i, kept in enumerate(output.past_key_values.layers) if kept.keys is not None]
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
