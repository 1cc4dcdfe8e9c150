"""The norm after attention is found by tracing, and a block that loses its input is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig

from kvsharer_exp.model.branch import Branch, check_stand_in, find_branches
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.projections import SharingError
from tests.refusals import WAY_OUT
from tests.tiny import ARCHITECTURES, NUM_LAYERS, hooks, tiny_model

NORMS = {
    "gemma2": "post_attention_layernorm",
    "gemma3_text": "post_attention_layernorm",
    "olmo2": "post_attention_layernorm",
    "glm4": "post_self_attn_layernorm",  # its post_attention_layernorm comes after the residual
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_the_norm_that_its_block_is_written_with(architecture: str) -> None:
    model = tiny_model(architecture)
    before = hooks(model)
    branches = find_branches(model, attention_layers(model))
    norm = NORMS.get(architecture)
    assert branches == tuple(Branch(index, norm) for index in range(NUM_LAYERS))
    places = ("attention",) if norm is None else ("attention", "branch")
    assert {branch.places for branch in branches} == {places}
    assert hooks(model) == before
    for branch in branches:
        check_stand_in(branch)


@pytest.mark.parametrize("architecture", ["gpt_neox", "stablelm"])
def test_both_forms_of_the_block_have_no_norm(architecture: str) -> None:
    """Parallel and one after the other: the default is only one of them."""
    for parallel in (True, False):
        model = tiny_model(architecture, use_parallel_residual=parallel)
        assert {b.norm for b in find_branches(model, attention_layers(model))} == {None}


def test_bloom_is_refused_because_it_adds_the_residual_inside_its_attention() -> None:
    config = BloomConfig(vocab_size=128, hidden_size=64, n_layer=3, n_head=4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    branches = find_branches(model, attention_layers(model))
    # Its norm receives what the attention returned, but so does the residual.
    assert [branch.norm for branch in branches] == [None] * 3
    with pytest.raises(SharingError, match=r"layer 2 \(BloomAttention\)") as refusal:
        check_stand_in(branches[2])
    line = str(refusal.value)
    assert "\n" not in line
    assert len(line) <= 190
    assert WAY_OUT.search(line)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.project(states), None


class CopyingDropout(nn.Dropout):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states.clone()


class Block(nn.Module):
    """A pre-norm block written by hand; ``form`` says what becomes of the attention's output."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.first = nn.LayerNorm(16)
        self.attention = Attention()
        self.dropout = CopyingDropout()
        self.second = nn.LayerNorm(16)
        self.mlp = nn.Linear(16, 16)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        attended, _ = self.attention(self.first(hidden_states))
        if self.form == "norm":
            attended = self.second(attended)
        elif self.form == "dropout, norm":
            attended = self.second(self.dropout(attended))
        elif self.form == "view, norm":
            attended = self.second(attended.flatten(0, 1)).view_as(hidden_states)
        elif self.form == "added in place":
            attended += hidden_states
            return attended + self.mlp(self.second(attended))
        elif self.form == "post-norm, added in place":
            attended += hidden_states
            return self.second(attended)
        elif self.form == "norm beside":
            attended = attended + self.second(attended)
        elif self.form == "mlp":
            attended = self.mlp(attended)
        elif self.form == "fails when called again":
            if hidden_states.square().mean() > 100:
                raise RuntimeError("called again")
        return hidden_states + attended


class Model(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 16)  # fewer tokens than the probe has
        self.blocks = nn.ModuleList([Block(form), Block(form)])

    @property
    def base_model(self) -> nn.Module:
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, tokens: torch.Tensor, use_cache: bool) -> torch.Tensor:
        states = self.embed(tokens)
        for block in self.blocks:
            states = block(hidden_states=states)
        return states

    @property
    def layers(self) -> list[Any]:
        return [
            SimpleNamespace(index=index, block=block, attention=block.attention)
            for index, block in enumerate(self.blocks)
        ]


@pytest.mark.parametrize(
    ("form", "norm"),
    [
        ("plain", None),
        ("norm", "second"),
        ("dropout, norm", "second"),
        ("view, norm", "second"),
        ("added in place", None),
        ("post-norm, added in place", None),
        ("norm beside", None),
        ("mlp", None),
    ],
)
def test_a_norm_is_one_through_which_all_of_the_attention_goes(form: str, norm: str | None) -> None:
    model = Model(form).eval()
    assert find_branches(model, model.layers) == (Branch(0, norm), Branch(1, norm))


def test_a_block_that_fails_leaves_no_hook() -> None:
    model = Model("fails when called again").eval()
    before = hooks(model)
    with pytest.raises(RuntimeError, match="called again"):
        find_branches(model, model.layers)
    assert hooks(model) == before


def test_a_block_that_overflows_is_refused_as_such() -> None:
    model = Model("plain").eval()
    with torch.no_grad():
        model.blocks[1].first.bias.fill_(float("nan"))
        model.blocks[1].attention.project.weight.fill_(0)
    find = find_branches(model, model.layers)
    assert find[1].refusal == ""  # what attention makes is replaced, so it does not matter
    model.blocks[1].register_forward_hook(lambda module, args, output: output * float("inf"))
    refusal = find_branches(model, model.layers)[1].refusal
    assert "layer 1 (Attention) overflows" in refusal
    assert len(refusal) <= 190
