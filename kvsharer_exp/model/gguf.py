"""Dequantise GGUF checkpoints to safetensors, once, and keep the result in the cache folder.

`load` calls this for the embedded models and for a user's ``.gguf`` file.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from kvsharer_exp.model.assets import ASSETS
from kvsharer_exp.model.availability import converted_folder
from kvsharer_exp.model.files import file_sha256, locked, partial_folder
from kvsharer_exp.model.folders import cache_dir
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import shorten

_log = logging.getLogger(__name__)


def converted(gguf: Path, name: str, digest: str) -> Path:
    """Return the folder with ``gguf`` dequantised to safetensors, made once and kept in the cache.

    Raises:
        InputError: ``gguf`` cannot be read as a GGUF model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = converted_folder(name, digest)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(folder.name + ".lock")):
        if folder.is_dir():
            return folder
        _log.info("converting %s to safetensors, once", gguf.name)
        options = {"gguf_file": gguf.name}
        with partial_folder(folder) as partial:
            try:
                model = AutoModelForCausalLM.from_pretrained(
                    str(gguf.parent),
                    dtype=torch.float32,
                    quantization_config=GgufConfig(dequantize=True),
                    **options,
                )
                tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **options)
            except Exception as error:  # whatever a reader of broken bytes stumbles on
                reason = " ".join(str(error).split())[:80]
                raise InputError(
                    f"{shorten(gguf.name)} cannot be read as a GGUF model ({reason}): "
                    "check that the file is whole"
                ) from error
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            partial.replace(folder)
    return folder


def gguf_assets() -> list[str]:
    """Return the names of the assets that are GGUF models."""
    return [name for name, asset in ASSETS.items() if asset.filename.endswith(".gguf")]


def gguf_sha256(path: Path) -> str:
    """Return the SHA-256 of a file; the cache remembers it while size and time stay the same."""
    records = cache_dir() / "models"
    records.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    return file_sha256(path, records / f"gguf-{name}.json")
