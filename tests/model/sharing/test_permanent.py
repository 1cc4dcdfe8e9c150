"""`make_shared`: what is gone, what is said to be gone, and who is not touched. That it runs as
`share_kv` does is in the contract."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import PreTrainedModel

from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.model.sharing.architectures import SharingError, attention_layers
from kvsharer_exp.model.sharing.permanent import make_shared
from kvsharer_exp.model.sharing.runtime import share_kv
from kvsharer_exp.values.sharing_map import SharingMap
from tests.tiny import ARCHITECTURES, NUM_LAYERS, hooks, some_map, tiny_model, tokens


@pytest.fixture
def model() -> PreTrainedModel:
    return copy.deepcopy(tiny_model("llama"))


def parameter_bytes(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exactly_the_promised_bytes_go(name: str) -> None:
    original = tiny_model(name)
    model, sharing_map = copy.deepcopy(original), some_map(original, 3)
    promised = footprint(original, sharing_map).parameter_bytes_saved
    assert make_shared(model, sharing_map) is model
    assert model.parameter_bytes_saved == promised > 0
    assert parameter_bytes(original) - parameter_bytes(model) == promised
    assert model.config.kv_source_layers == list(sharing_map.kv_source_layers)
    # What is left is held on its own: nothing is a window on a larger tensor that lives on.
    storages = (parameter.untyped_storage() for parameter in model.parameters())
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert sum(held.values()) == parameter_bytes(model)


def test_state_dict_has_no_projections_of_targets(model) -> None:
    make_shared(model, SharingMap((0, 1, 2, 0, 1, 5)))
    gone = {
        f"model.layers.{target}.self_attn.{name}.weight"
        for target in (3, 4)
        for name in ("k_proj", "v_proj")
    }
    assert tiny_model("llama").state_dict().keys() - model.state_dict().keys() == gone
    assert "kv_source_layers" not in tiny_model("llama").config.to_dict()


def test_the_identity_map_changes_nothing_but_the_config(model) -> None:
    before = hooks(model)
    make_shared(model, SharingMap.identity(NUM_LAYERS))
    assert hooks(model) == before
    assert model.parameter_bytes_saved == 0


def test_maps_do_not_stack(model) -> None:
    make_shared(model, some_map(model))
    for enter in (share_kv, make_shared):
        with pytest.raises(SharingError, match="shares KV for good"):
            with enter(model, SharingMap.identity(NUM_LAYERS)):
                pass
    other = copy.deepcopy(tiny_model("llama"))
    with share_kv(other, some_map(other)):
        with pytest.raises(SharingError, match="already running under a map"):
            make_shared(other, some_map(other))


def test_a_map_that_does_not_fit_leaves_the_model_as_it_was(model) -> None:
    before = hooks(model), model.config.to_json_string()
    with pytest.raises(SharingError, match="map has 7 layers but the model has 6"):
        make_shared(model, SharingMap.identity(7))
    assert (hooks(model), model.config.to_json_string()) == before


def test_a_copy_made_before_is_not_touched_and_one_made_after_stands_alone(model) -> None:
    ids = tokens()
    with torch.inference_mode():
        stock = model(ids).logits
        before = copy.deepcopy(model)
        shared = make_shared(model, some_map(model, 3))(ids).logits
        after = copy.deepcopy(model)
        assert torch.equal(before(ids).logits, stock)
        for module in attention_layers(model):
            module.attention._forward_pre_hooks.clear()  # breaks the first, not its copy
        assert torch.equal(after(ids).logits, shared)


def test_many_threads_may_run_it(model) -> None:
    """Each thread hands over its own KV; the barrier makes the forwards meet mid-way."""
    make_shared(model, some_map(model, 3))
    prompts = [tokens(1, 12, seed) for seed in range(2)]
    with torch.inference_mode():
        alone = [model(ids).logits for ids in prompts]
    barrier = threading.Barrier(2)

    def meet(module: torch.nn.Module, args: object, output: object) -> None:
        barrier.wait(20)

    meeting = model.model.layers[2].register_forward_hook(meet)

    def run(ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(ids).logits

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, prompts))
    meeting.remove()
    assert all(map(torch.equal, together, alone))


def test_saved_and_its_weights_loaded_again(model, tmp_path) -> None:
    """`export` rests on this: the folder holds no weights of targets, the config says why."""
    sharing_map = some_map(model, 3)
    make_shared(model, sharing_map).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=model.dtype).eval()
    assert SharingMap.parse(again.config.kv_source_layers) == sharing_map
    with torch.inference_mode():
        expected = model(tokens()).logits
        assert torch.equal(make_shared(again, sharing_map)(tokens()).logits, expected)
