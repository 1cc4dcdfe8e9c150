"""Rewrite an InternLM2 checkpoint as the Llama it is, so that it runs without remote code.

`load` calls this for InternLM2, from a folder or the hub, unless remote code is trusted. The
conversion works on a local folder of safetensors, one file at a time, and reads only JSON and
tensors. Its tokenizer is not tested here.

InternLM2 is Llama with other names and with queries, keys and values fused in ``wqkv``. That tensor
holds, for every KV head, the rows of its queries, its key and its value. Rows are split and tensors
renamed, nothing more, so the logits are those of the original.

InternLM2: https://arxiv.org/abs/2403.17297 §2.2
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kvsharer_exp.values.errors import InputError

_INDEX = "model.safetensors.index.json"
_OUTSIDE = {
    "model.tok_embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_LAYER = re.compile(r"(model\.layers\.\d+)\.(.+)\.(weight|bias|inv_freq)")
_SAME = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps use_cache tie_word_embeddings "
    "pad_token_id bos_token_id eos_token_id torch_dtype dtype"
).split()
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


def is_internlm2(folder: Path) -> bool:
    """Whether ``folder`` holds an InternLM2 checkpoint; its ``config.json`` tells."""
    path = folder / "config.json"
    return path.is_file() and _read(path).get("model_type") == "internlm2"


def convert(source: Path, target: Path) -> Path:
    """Write the InternLM2 of ``source`` to ``target`` as a Llama checkpoint; return ``target``.

    ``target`` appears only when it is complete. The tokenizer is copied too, and is given the class
    ``LlamaTokenizer``, which the authors' own converter names too.

    Raises:
        InputError: ``source`` is not InternLM2 or has no safetensors, a tensor or the kind of RoPE
            scaling is unknown, or ``target`` exists.
    """
    if not is_internlm2(source):
        raise InputError(f"{source.name[:80]}: give a folder with model_type internlm2")
    if target.exists():
        raise InputError(f"{target.name[:80]} exists: remove it or name another folder")
    config = llama_config(_read(source / "config.json"))
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise InputError(f"{source.name[:80]} holds no .safetensors: convert its weights first")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".internlm2-", dir=target.parent))
    try:
        weight_map: dict[str, str] = {}
        size = 0
        for file in files:
            with safe_open(file, framework="pt") as opened:
                tensors = dict(
                    pair
                    for name in opened.keys()
                    for pair in llama_tensors(name, opened.get_tensor(name), config)
                )
            save_file(tensors, partial / file.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file.name)
            size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if [file.name for file in files] != ["model.safetensors"]:
            _write(partial / _INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        _write(partial / "config.json", config)
        _copy_tokenizer(source, partial)
        partial.chmod(0o755)  # mkdtemp makes it private
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def llama_config(config: dict[str, Any]) -> dict[str, Any]:
    """Translate the ``config.json`` of an InternLM2 into that of the equal Llama.

    Raises:
        InputError: the kind of RoPE scaling is one that the original does not have.
    """
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "dynamic"):
        raise InputError(
            f"rope_scaling type {str(kind)[:40]!r} is not InternLM2's: use linear, dynamic or none"
        )
    rope = {"rope_type": kind, "rope_theta": config.get("rope_theta", 10000)}
    if kind != "default":
        rope["factor"] = float(scaling["factor"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: config[name] for name in _SAME if name in config},
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "attention_bias": bool(config.get("bias", False)),
        "mlp_bias": False,
        "rope_parameters": rope,
    }


def llama_tensors(
    name: str, tensor: torch.Tensor, config: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensor or tensors of Llama that the tensor ``name`` becomes, with their names.

    ``config`` is that of the Llama. ``wqkv`` has the shape (num_key_value_heads × (queries per KV
    head + 2) × head_dim, hidden_size), and its bias has the first of these sizes.

    Raises:
        InputError: InternLM2 has no such tensor.
    """
    if name in _OUTSIDE:
        yield _OUTSIDE[name], tensor
        return
    match = _LAYER.fullmatch(name)
    if match is None:
        raise InputError(f"tensor {name[:100]!r} is not InternLM2's: give its own weights")
    layer, part, kind = match.groups()
    if part in _INSIDE:
        yield f"{layer}.{_INSIDE[part]}.{kind}", tensor
    elif part == "attention.wqkv":
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        shape = (kv_heads, heads // kv_heads + 2, config["hidden_size"] // heads)
        grouped = tensor.unflatten(0, shape)
        parts = {"q": grouped[:, :-2], "k": grouped[:, -2:-1], "v": grouped[:, -1:]}
        for letter, rows in parts.items():
            # Each part gets its own memory, because safetensors refuses views of one tensor.
            yield f"{layer}.self_attn.{letter}_proj.{kind}", rows.flatten(0, 2).contiguous()
    elif kind != "inv_freq":  # Llama computes it from the config
        raise InputError(f"tensor {name[:100]!r} is not InternLM2's: give its own weights")


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in _TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    path = source / "tokenizer_config.json"
    if path.is_file():
        settings = _read(path)
        settings.pop("auto_map", None)  # it would ask for remote code
        _write(target / path.name, settings | {"tokenizer_class": "LlamaTokenizer"})


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
