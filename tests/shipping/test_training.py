"""An export that is trained: checkpointed or not, by either way of loading, the same gradients."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from kvsharer_exp import make_shared
from tests.model.sharing.test_checkpointing import adapt, check_equal, checkpoint, gradients, loss
from tests.shipping.exports import WAYS, export, theirs
from tests.tiny import some_map, tiny_model

NAMES = ("llama", "olmo", "gemma3_text", "phi3", "gpt2", "gpt_neox", "qwen3_moe")


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tokenizer, tmp_path_factory) -> Path:
    return export(request.param, tokenizer, tmp_path_factory.mktemp("training") / "export")


def ready(model: PreTrainedModel) -> PreTrainedModel:
    if "Moe" in type(model).__name__:
        model.set_experts_implementation("eager")  # the default has no float64
    return model.train().requires_grad_(True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_without_checkpointing(way: str, reentrant: bool, folder) -> None:
    """Public fault 20: the recomputed forward of a target found no KV (KeyError in backward)."""
    model = ready(WAYS[way](folder))
    losses = [loss(model, seed) for seed in range(2)]  # each waits for its backward
    sum(losses).backward()
    plain = gradients(model)
    checkpoint(model, reentrant)
    for one in [loss(model, seed) for seed in range(2)]:
        one.backward()
    check_equal(gradients(model), plain)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_adapters_on_queries_and_outputs(way: str, reentrant: bool, tokenizer, tmp_path) -> None:
    """The gradients are also those of the model that was exported."""
    original = make_shared(copy.deepcopy(tiny_model("llama")), some_map(tiny_model("llama"), 2))
    model = WAYS[way](export("llama", tokenizer, tmp_path / "export"))
    checkpoint(model, reentrant)
    found = []
    for one in (original, model):
        adapt(one.train())
        loss(one).backward()
        found.append(gradients(one))
    check_equal(*found)


def test_nothing_is_kept_after_the_backward(tokenizer, tmp_path: Path) -> None:
    model = theirs(export("llama", tokenizer, tmp_path / "export")).train()
    model.requires_grad_(True)
    checkpoint(model)
    loss(model).backward()
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    meetings = {id(hook.meeting): hook.meeting for hook in hooks if hasattr(hook, "meeting")}
    assert len(meetings) == 1
    for meeting in meetings.values():
        assert not any(left for left in meeting._by_thread.values())


def test_a_copy_checkpoints_among_its_own_layers(tokenizer, tmp_path: Path) -> None:
    model = theirs(export("llama", tokenizer, tmp_path / "export")).train().requires_grad_(True)
    checkpoint(model)
    loss(model).backward()
    plain = gradients(model)
    copied = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module._forward_pre_hooks.clear()  # breaks the first, not its copy
    loss(copied).backward()
    check_equal(gradients(copied), plain)
    assert all(torch.isfinite(gradient).all() for gradient in plain.values())
