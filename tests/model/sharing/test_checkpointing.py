"""Gradient checkpointing of a model that shares KV gives the gradients of a forward without it."""

import copy
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from transformers import PreTrainedModel

from kvsharer_exp.model.sharing.architectures import SharingError, attention_layers
from kvsharer_exp.model.sharing.exchange import Exchange, Handover
from kvsharer_exp.model.sharing.permanent import make_shared
from kvsharer_exp.values.sharing_map import SharingMap
from tests.tiny import contract_architectures, hooks, running, some_map, tiny_model, tokens

MAP = SharingMap((0, 1, 1, 3, 0, 3))  # readers of three sources, between each other


def trainable(name: str) -> PreTrainedModel:
    return copy.deepcopy(tiny_model(name)).train().requires_grad_(True)


def checkpoint(model: PreTrainedModel, reentrant: bool = False) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def loss(model: PreTrainedModel, seed: int = 0) -> torch.Tensor:
    ids = tokens(seed=seed)
    torch.manual_seed(seed)  # some have dropout
    return model(ids, labels=ids, use_cache=False).loss


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Take the gradients that are there, leaving none."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def check_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert any(gradient.any() for gradient in one.values())
    for name, gradient in one.items():
        tolerance = 1e-9 if gradient.dtype == torch.float64 else 1e-4
        torch.testing.assert_close(gradient, other[name], rtol=tolerance, atol=tolerance)


def runs_of_attention(model: PreTrainedModel) -> list[int]:
    """A list that grows by the index of every attention that runs."""
    ran: list[int] = []
    for layer in attention_layers(model):
        layer.attention.register_forward_pre_hook(
            lambda module, args, index=layer.index: ran.append(index)
        )
    return ran


def exchanges(model: PreTrainedModel) -> Iterator[Exchange]:
    for layer in attention_layers(model):
        for hook in layer.attention._forward_pre_hooks.values():
            yield hook.exchange


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", ["context", "permanent"])
@pytest.mark.parametrize("name", contract_architectures())
def test_gradients_are_those_without_checkpointing(name: str, form: str, reentrant: bool) -> None:
    """Public fault 20: the recomputed forward of a target found no KV (KeyError in backward)."""
    model = trainable(name)
    with running(model, some_map(model, 3), form) as shared:
        shared.requires_grad_(True)  # also what was kept of fused projections
        loss(shared).backward()
        plain = gradients(shared)
        checkpoint(shared, reentrant)
        ran = runs_of_attention(shared)
        loss(shared).backward()
        check_equal(gradients(shared), plain)
    assert sorted(ran) == sorted(2 * list(range(6)))  # each of them twice: it was checkpointed


@pytest.mark.parametrize("reentrant", [False, True])
def test_forwards_that_wait_for_their_backward_do_not_mix(reentrant: bool) -> None:
    model = make_shared(trainable("llama"), MAP)
    losses = [loss(model, seed) for seed in range(2)]
    for one in losses:
        one.backward()
    plain = gradients(model)
    checkpoint(model, reentrant)
    losses = [loss(model, seed) for seed in range(2)]
    for one in losses:
        one.backward()
    check_equal(gradients(model), plain)


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_some_layers_checkpointed_and_some_not(reentrant: bool, every: int) -> None:
    model = make_shared(trainable("llama"), MAP)
    loss(model).backward()
    plain = gradients(model)
    checkpoint(model, reentrant)
    for index, block in enumerate(model.model.layers):
        block.gradient_checkpointing = index % every == 0
    loss(model).backward()
    check_equal(gradients(model), plain)


@pytest.mark.parametrize("form", ["context", "permanent"])
def test_a_backward_in_another_thread(form: str) -> None:
    """On a GPU, autograd runs blocks again in a thread of its own."""
    with running(trainable("llama"), MAP, form) as model:
        loss(model).backward()
        plain = gradients(model)
        checkpoint(model)
        waiting = loss(model)
        thread = threading.Thread(target=waiting.backward)
        thread.start()
        thread.join()
        check_equal(gradients(model), plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_nothing_is_kept_after_the_backward(reentrant: bool) -> None:
    model = make_shared(trainable("llama"), MAP)
    checkpoint(model, reentrant)
    loss(model).backward()
    for exchange in exchanges(model):
        assert exchange._handovers == {threading.get_ident(): Handover()}


class LowRank(nn.Module):
    """An adapter like PEFT's: a frozen linear layer plus a trained product of two thin ones."""

    def __init__(self, base: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        weight = base.weight
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1], dtype=weight.dtype))
        self.up = nn.Parameter(torch.randn(weight.shape[0], rank, dtype=weight.dtype))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.base(hidden_states) + hidden_states @ self.down.T @ self.up.T


def adapt(model: PreTrainedModel) -> None:
    """Freeze ``model`` and put adapters on the queries and outputs of every layer."""
    model.requires_grad_(False)
    torch.manual_seed(1)
    for block in model.model.layers:
        for name in ("q_proj", "o_proj"):
            setattr(block.self_attn, name, LowRank(getattr(block.self_attn, name)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3"])
def test_adapters_on_queries_and_outputs(name: str, reentrant: bool) -> None:
    """Public fault 20: the gradient of an early adapter comes through the KV that others read."""
    model = make_shared(trainable(name), some_map(tiny_model(name), 3))
    adapt(model)
    loss(model).backward()
    plain = gradients(model)
    assert len(plain) == 6 * 2 * 2
    checkpoint(model, reentrant)
    loss(model).backward()
    check_equal(gradients(model), plain)


def test_a_copy_checkpoints_among_its_own_layers() -> None:
    model = make_shared(trainable("llama"), MAP)
    checkpoint(model)
    loss(model).backward()
    plain = gradients(model)
    copied = copy.deepcopy(model)
    for layer in attention_layers(model):
        layer.attention._forward_pre_hooks.clear()  # breaks the first, not its copy
    loss(copied).backward()
    check_equal(gradients(copied), plain)


def test_the_model_is_as_before_after_the_block() -> None:
    model = trainable("llama")
    checkpoint(model)
    before = hooks(model)
    functions = [block._gradient_checkpointing_func for block in model.model.layers]
    loss(model).backward()
    plain = gradients(model)
    with running(model, MAP):
        loss(model).backward()
        assert any(not torch.equal(plain[n], g) for n, g in gradients(model).items())
    assert hooks(model) == before
    assert [block._gradient_checkpointing_func for block in model.model.layers] == functions
    loss(model).backward()
    check_equal(gradients(model), plain)


def test_checkpointing_switched_off_and_on_again() -> None:
    model = make_shared(trainable("llama"), MAP)
    loss(model).backward()
    plain = gradients(model)
    for switch in (checkpoint, lambda m: m.gradient_checkpointing_disable(), checkpoint):
        switch(model)
        loss(model).backward()
        check_equal(gradients(model), plain)


def test_a_block_that_is_checkpointed_by_other_means_is_refused() -> None:
    model = make_shared(trainable("llama"), MAP)
    block = model.model.layers[4]
    stock = block.forward
    block.forward = lambda *args, **kwargs: torch_checkpoint(
        stock, *args, use_reentrant=False, **kwargs
    )
    waiting = loss(model)
    with pytest.raises(SharingError, match="layer 4 runs without layer 0, whose KV it reads"):
        waiting.backward()
