"""A map means the same under every attention implementation, or the implementation is refused."""

import copy
import importlib.util

import pytest
import torch
from transformers import PreTrainedModel

from kvsharer_exp.model.sharing.architectures import SharingError
from kvsharer_exp.model.sharing.runtime import share_kv
from tests.tiny import running, some_map, tiny_model, tokens


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


FORMS = ["context", "permanent"]


def check_same_as_sdpa(model: PreTrainedModel, implementation: str, form: str) -> None:
    """One-shot and continued from a cache, against the difference that the map makes."""
    ids, sharing_map = tokens(), some_map(model, 3)
    model.set_attn_implementation("sdpa")
    stock = model(ids).logits
    with running(model, sharing_map, form) as shared:
        one_shot = shared(ids, use_cache=False).logits
        shared.set_attn_implementation(implementation)
        other = shared(ids, use_cache=False).logits
        cache = shared(ids[:, :11], use_cache=True).past_key_values
        continued = shared(ids[:, 11:], past_key_values=cache).logits
    scale = (one_shot - stock).abs().max()
    assert (other - one_shot).abs().max() < 1e-4 * scale
    assert (continued - one_shot[:, 11:]).abs().max() < 1e-4 * scale


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox", "phi3", "gpt2"])
def test_eager(name: str, form: str) -> None:
    check_same_as_sdpa(copy.deepcopy(tiny_model(name)), "eager", form)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("form", FORMS)
# Not gemma3_text: continuing its sliding cache, torch 2.13 on a CPU writes C++ that does not
# compile, for the stock model too. Not gpt2: it has no flex_attention.
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi3"])
def test_flex(name: str, form: str) -> None:
    torch.compiler.reset()  # it gives up after so many models
    check_same_as_sdpa(copy.deepcopy(tiny_model(name)).float(), "flex_attention", form)


def test_flash_attention_2_runs_or_is_refused() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    if importlib.util.find_spec("flash_attn") or torch.cuda.is_available():
        pytest.skip("covered on a CUDA device by tests/gpu")
    with share_kv(model, some_map(model, 3)):
        with pytest.raises(ImportError, match=r"flash[-_ ]attn|flash_attention_2|FlashAttention2"):
            model.set_attn_implementation("flash_attention_2")


@pytest.mark.parametrize("form", FORMS)
def test_continuous_batching_is_refused(form: str) -> None:
    """It hands its paged cache to the attention function, past ``cache.update``."""
    model = tiny_model("llama")
    with running(model, some_map(model), form) as shared:
        with pytest.raises(SharingError, match="continuous batching"):
            shared(tokens(), cache=object(), use_cache=False)
