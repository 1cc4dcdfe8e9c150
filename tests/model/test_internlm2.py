"""An InternLM2 written out here, and the Llama it is converted to: the same logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import AutoModelForCausalLM

from kvsharer_exp.model.internlm2 import convert, is_internlm2, llama_config
from kvsharer_exp.model.load import load_model
from kvsharer_exp.model.sharing.runtime import share_kv
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.sharing_map import SharingMap

CONFIG: dict[str, Any] = {
    "model_type": "internlm2",
    "architectures": ["InternLM2ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "bias": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD_DIM = 8


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.wqkv = nn.Linear(32, (4 + 2 * 2) * HEAD_DIM, bias=bias)
        self.wo = nn.Linear(32, 32, bias=bias)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        # (batch, length, KV heads, queries per KV head + key + value, head_dim)
        grouped = self.wqkv(x).view(batch, length, 2, 4, HEAD_DIM)
        query = grouped[..., :2, :].reshape(batch, length, 4, HEAD_DIM).transpose(1, 2)
        key, value = (
            grouped[..., at, :].transpose(1, 2).repeat_interleave(2, dim=1) for at in (-2, -1)
        )

        def rotate(states: torch.Tensor) -> torch.Tensor:
            first, second = states.chunk(2, -1)
            return states * cos + torch.cat([-second, first], -1) * sin

        mixed = scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        return self.wo(mixed.transpose(1, 2).reshape(batch, length, 32))


class Layer(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.attention = Attention(bias)
        self.feed_forward = nn.ModuleDict(
            {
                "w1": nn.Linear(32, 48, bias=False),
                "w3": nn.Linear(32, 48, bias=False),
                "w2": nn.Linear(48, 32, bias=False),
            }
        )
        self.attention_norm = Norm()
        self.ffn_norm = Norm()

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        normed, mlp = self.ffn_norm(x), self.feed_forward
        return x + mlp["w2"](silu(mlp["w1"](normed)) * mlp["w3"](normed))


class InternLM2(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.tok_embeddings = nn.Embedding(260, 32)
        self.model.layers = nn.ModuleList(Layer(config["bias"]) for _ in range(3))
        self.model.norm = Norm()
        self.output = nn.Linear(32, 260, bias=False)

    def rope(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        base, positions = self.config["rope_theta"], torch.arange(length).double()
        scaling, limit = self.config.get("rope_scaling"), self.config["max_position_embeddings"]
        if scaling and scaling["type"] == "linear":
            positions = positions / scaling["factor"]
        if scaling and scaling["type"] == "dynamic" and length > limit:
            factor = scaling["factor"]
            base *= (factor * length / limit - (factor - 1)) ** (HEAD_DIM / (HEAD_DIM - 2))
        inverse = base ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
        angles = torch.outer(positions, inverse).repeat(1, 2)
        return angles.cos(), angles.sin()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, rope = self.model.tok_embeddings(ids), self.rope(ids.shape[1])
        for layer in self.model.layers:
            x = layer(x, *rope)
        return self.output(self.model.norm(x))


def written(folder: Path, files: int = 1, **changes: Any) -> InternLM2:
    """A random InternLM2 with its checkpoint in ``folder``, in so many files."""
    torch.manual_seed(0)
    model = InternLM2(CONFIG | changes).double().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=0.3)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["x", None]}, "tokenizer_class": "InternLM2Tok"})
    )
    state = list(model.state_dict().items())
    for number in range(files):
        name = f"model-{number}.safetensors" if files > 1 else "model.safetensors"
        save_file(dict(state[number::files]), folder / name)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 260, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": True},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 3.0}},  # 24 tokens are past the limit
    ],
    ids=lambda changes: "-".join(map(str, changes)) + str(changes.get("rope_scaling", "")),
)
def test_logits_are_those_of_the_original(tmp_path, ids, changes, files: int) -> None:
    original = written(tmp_path / "source", files, **changes)
    folder = convert(tmp_path / "source", tmp_path / "llama")
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True, trust_remote_code=False
    )
    assert not any(report.values()), report
    with torch.inference_mode():
        # RoPE's angles are float32 in transformers, double here.
        torch.testing.assert_close(model(ids).logits, original(ids), rtol=1e-5, atol=1e-5)
        with share_kv(model, SharingMap((0, 1, 1))):
            assert not torch.equal(model(ids).logits, original(ids))


def test_weights_are_moved_and_never_changed(tmp_path) -> None:
    """Row by row: the wqkv of every KV head is its queries, its key, its value."""
    original = written(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(
        convert(tmp_path / "source", tmp_path / "llama"), dtype=torch.float64
    )
    fused = original.model.layers[1].attention.wqkv.weight.view(2, 4, HEAD_DIM, 32)
    attention = model.model.layers[1].self_attn
    for kv_head in range(2):
        for query in range(2):
            rows = attention.q_proj.weight.view(4, HEAD_DIM, 32)[2 * kv_head + query]
            assert torch.equal(rows, fused[kv_head, query])
        for at, name in ((2, "k_proj"), (3, "v_proj")):
            rows = getattr(attention, name).weight.view(2, HEAD_DIM, 32)[kv_head]
            assert torch.equal(rows, fused[kv_head, at])
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in original.parameters()
    )


def test_nothing_asks_for_remote_code(tmp_path) -> None:
    written(tmp_path / "source")
    assert is_internlm2(tmp_path / "source")
    folder = convert(tmp_path / "source", tmp_path / "llama")
    assert not is_internlm2(folder)
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((folder / name).read_text())


def test_refuses_what_it_does_not_know_and_leaves_nothing(tmp_path) -> None:
    source, target = tmp_path / "source", tmp_path / "llama"
    written(source)
    save_file({"model.layers.0.attention.q_norm.weight": torch.ones(2)}, source / "z.safetensors")
    with pytest.raises(InputError, match="q_norm"):
        convert(source, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    for file in source.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match=r"no \.safetensors"):
        convert(source, target)
    with pytest.raises(InputError, match="'yarn' is not InternLM2's"):
        llama_config(CONFIG | {"rope_scaling": {"type": "yarn", "factor": 2.0}})
    (source / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="model_type internlm2"):
        convert(source, target)
    written(source)
    target.mkdir()
    with pytest.raises(InputError, match="exists"):
        convert(source, target)


def test_a_local_folder_loads_by_its_path(tmp_path, ids, monkeypatch) -> None:
    """`load_model` converts it once into the cache and needs none of its code."""
    monkeypatch.setenv("KVSHARER_CACHE", str(tmp_path / "cache"))
    original = written(tmp_path / "source")
    load_model("tiny")[1].save_pretrained(tmp_path / "source")
    models = [load_model(str(tmp_path / "source"))[0] for _ in range(2)]
    for model in models:
        assert model.config.model_type == "llama"
        torch.testing.assert_close(model(ids).logits, original(ids).float(), rtol=1e-3, atol=1e-3)
    assert len(list((tmp_path / "cache" / "models").glob("internlm2-*/config.json"))) == 1
