"""What a plan refuses to run with, by name, and the caches and ways of decoding that work."""

import copy

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

from kvsharer_exp.model.fitted_plan import Fit, FittedPlan
from kvsharer_exp.model.sharing.architectures import SharingError, attention_layers
from kvsharer_exp.model.sharing.permanent import make_plan
from kvsharer_exp.model.sharing.runtime import apply_plan, share_kv
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap
from tests.model.actions.plans import PLANS, fitted
from tests.refusals import check_refusal
from tests.tiny import tiny_model, tokens

QUANTISED = KVPlan.parse("0_1q4g8_2_3q3g8s2_4_5")
UNQUANTISED = [
    PLANS[name] for name in ("halves", "stand-ins", "all but one", "without even layers")
]


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("text", UNQUANTISED)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_static_caches_hold_what_a_plan_keeps(name: str, text: str) -> None:
    model, ids = tiny_model(name), tokens(length=12)
    plan = fitted(model, text)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with apply_plan(model, plan):
        static = model.generate(ids, cache_implementation="static", **options)
        uncached = model.generate(ids, use_cache=False, **options)
    assert torch.equal(static, uncached)


@pytest.mark.parametrize("text", UNQUANTISED)
def test_assisted_decoding_works_where_nothing_is_quantised(text: str) -> None:
    model, ids = tiny_model("llama"), tokens(1, 12)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with apply_plan(model, fitted(model, text)):
        plain = model.generate(ids, **options)
        looked_up = model.generate(ids, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(plain, looked_up)


def test_assisted_decoding_static_and_quantised_caches_are_refused_by_name() -> None:
    model, ids = tiny_model("llama"), tokens(1, 12)
    with apply_plan(model, QUANTISED):
        with pytest.raises((SharingError, ValueError), match=r"[Aa]ssisted|crop"):
            model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=8)
        with pytest.raises(SharingError, match=r"layer 1 keeps 4 bits.*use the dynamic cache"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=32))
        full = DynamicCache(config=model.config)
    model(ids, past_key_values=full)
    with apply_plan(model, QUANTISED):
        with pytest.raises(
            SharingError, match="layer 1 of the cache holds KV of all tokens in full"
        ):
            model(ids, past_key_values=full)


class Rounded(QuantizedLayer):
    """A layer of a `QuantizedCache` that needs no back end: it rounds numbers to quarters."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return (tensor * 4).round()

    def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
        return q_tensor / 4


@pytest.mark.parametrize("grows", [False, True])
def test_a_cache_that_quantises_is_refused_beside_bits_and_works_beside_sharing(
    grows: bool,
) -> None:
    model, ids = tiny_model("llama"), tokens(1, 12)

    def cache() -> Cache:
        if grows:
            return Cache(layer_class_to_replicate=Rounded)
        return Cache(layers=[Rounded() for _ in range(6)])

    with apply_plan(model, QUANTISED):
        with pytest.raises(SharingError, match=r"layer 1 keeps 4 bits, but the cache quantises"):
            model(ids, past_key_values=cache())
    with apply_plan(model, KVPlan.parse("0_1_0_3_4_5")):
        kept = cache()
        model(ids, past_key_values=kept)
        assert kept.get_seq_length() == 12


def test_a_cache_that_was_filled_under_a_plan_is_refused_without_it() -> None:
    model, ids = tiny_model("llama"), tokens(1, 12)
    for text in ("0_1q4g8_2_3_4_5", "0_1w2+5_2_3_4_5", "0_x_2_3_4_5", "0_0_2_3_4_5"):
        cache = DynamicCache(config=model.config)
        with apply_plan(model, KVPlan.parse(text)):
            model(ids, past_key_values=cache)
        with pytest.raises((SharingError, NotImplementedError)):
            model(ids[:, :1], past_key_values=cache)


def test_attention_that_takes_no_mask_and_training_are_refused() -> None:
    model, ids = copy.deepcopy(tiny_model("llama")).float(), tokens(1, 12)
    model.set_attn_implementation("flex_attention")
    with apply_plan(model, QUANTISED):
        # It is refused before transformers makes a mask for it, which compiles.
        with pytest.raises(SharingError, match="flex_attention cannot mask"):
            model(ids)
    model.set_attn_implementation("sdpa")
    with torch.inference_mode(False), torch.enable_grad():
        trained = make_plan(copy.deepcopy(model), QUANTISED).train()
        with pytest.raises(SharingError, match="while training"):
            trained(ids.clone())


def test_stand_ins_are_trained_with_the_model() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        model = copy.deepcopy(tiny_model("llama")).requires_grad_(True)
        plan = fitted(model, PLANS["stand-ins"])
        trained = make_plan(model, plan).train()
        trained(tokens().clone(), labels=tokens().clone()).loss.backward()
        stand_in = trained.model.layers[1].self_attn
        assert stand_in.weight.grad.abs().sum() > 0
        assert stand_in.bias.grad.abs().sum() > 0


def test_a_plan_that_does_not_fit_is_refused_by_layer_and_reason() -> None:
    llama, gemma = tiny_model("llama"), tiny_model("gemma3_text")
    for model, text, message in (
        (llama, "0_1_x", "plan has 3 layers but the model has 6: give one action per layer"),
        (gemma, "0_1_2_0k1v_4_5", "layer 3 cannot read layer 0: full_attention against sliding"),
        (gemma, "0_1q4_1_3_4_5", "layer 2 cannot read layer 1"),
        (gemma, "0w2+8_1_2_3_4_5", r"layer 0 cannot keep w2\+8: its own window of 8 tokens"),
    ):
        with pytest.raises(SharingError, match=message):
            with apply_plan(model, KVPlan.parse(text)):
                raise AssertionError
    odd = tiny_model("llama", head_dim=12)
    with pytest.raises(SharingError, match="layer 1 cannot keep 4 bits: its heads have 12 key"):
        with apply_plan(odd, KVPlan.parse("0_1q4_2_3_4_5")):
            raise AssertionError
    with pytest.raises(InputError, match="fit_plan"):
        make_plan(copy.deepcopy(llama), KVPlan.parse("0_c_2_3_4_5"))


def test_fits_of_another_model_are_refused_by_layer() -> None:
    """They ended in an error of torch, or of Python, within the first forward."""
    model, plan = tiny_model("llama"), KVPlan.parse("0_1_a_c_4_5")
    fits = fitted(tiny_model("llama"), str(plan)).fits
    small, none = torch.zeros(3, 3), Fit({"bias": fits[2].tensors["bias"]})
    for layer, wrong in (
        (2, Fit({"weight": small, "bias": small[0]})),
        (2, none),
        (2, Fit(fits[2].tensors, "norm_of_another")),
        (3, Fit({"bias": small[0]})),
    ):
        with pytest.raises(SharingError) as error:
            with apply_plan(model, FittedPlan(plan, {**fits, layer: wrong})):
                pass
        check_refusal(f"kvsharer: {error.value}", f"layer {layer}: its fit is one of another")
    with apply_plan(model, FittedPlan(plan, fits)):
        assert model(tokens(1)).logits.isfinite().all()


def test_plans_do_not_stack() -> None:
    model = tiny_model("llama")
    with apply_plan(model, KVPlan.parse("0_x_2_3_4_5")):
        with pytest.raises(SharingError, match="already"):
            with share_kv(model, SharingMap.identity(6)):
                raise AssertionError
    good = make_plan(copy.deepcopy(model), KVPlan.parse("0_x_2_3_4_5"))
    with pytest.raises(SharingError, match="make_plan is for good"):
        with apply_plan(good, KVPlan.full(6)):
            raise AssertionError


def test_a_block_that_adds_its_residual_inside_takes_no_stand_in() -> None:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=128, hidden_size=64, n_layer=3, n_head=4)
    bloom = BloomForCausalLM(config).eval()
    assert len(attention_layers(bloom)) == 3
    with pytest.raises(SharingError, match=r"layer 1 .*takes no stand-in"):
        with apply_plan(bloom, KVPlan.parse("0_x_2")):
            raise AssertionError
    assert isinstance(bloom.transformer.h[1].self_attention, nn.Module)
