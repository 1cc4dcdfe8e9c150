"""Describe a loaded model: its shapes, its fingerprint, and whether its texts begin with BOS.

Commands record what `describe` returns with their runs, and begin texts as `adds_bos` says.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from kvsharer_exp.model.assets import ASSETS
from kvsharer_exp.model.files import sha256
from kvsharer_exp.model.gguf import gguf_sha256
from kvsharer_exp.model.spec import ModelSpec, model_id


def describe(model: Any, spec: ModelSpec) -> dict[str, Any]:
    """Return what identifies the weights, and the shapes that matter for the cache."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return {
        "id": model_id(spec),
        "num_layers": config.num_hidden_layers,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fingerprint": _fingerprint(model, spec),
    }


def _fingerprint(model: Any, spec: ModelSpec) -> str:
    kind, _, rest = spec.source.partition(":")
    if kind == "wheel":
        return ASSETS[rest].sha256[:12]
    if kind == "random":
        return f"{rest}-{spec.seed}"
    source = spec.source.removeprefix("hub:")
    if source.endswith(".gguf"):
        return gguf_sha256(Path(source).expanduser())[:12]
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return str(commit)[:12]
    digest = hashlib.sha256()
    for path in sorted(Path(source).expanduser().glob("*")):
        if path.suffix in (".json", ".safetensors"):
            digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()[:12]


def adds_bos(spec: ModelSpec, tokenizer: Any) -> bool:
    """Whether a text of this model begins with BOS.

    ``spec.add_bos_token`` decides where it is given; otherwise the tokenizer's own habit does.
    """
    if spec.add_bos_token is not None:
        return spec.add_bos_token
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == (
        tokenizer.bos_token_id
    )
