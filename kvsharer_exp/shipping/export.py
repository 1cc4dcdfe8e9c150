"""Ship a map: write a model folder without the weights that targets no longer need, and load it.

The command ``export`` writes the folder. `load_exported` is for users of this package.

The folder is an ordinary transformers one. `load_exported` builds the stock model and shares it.
Without this package ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` does
the same, with the code in the file beside the weights (`exported_model`).
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvsharer_exp.model.load import quiet_transformers
from kvsharer_exp.model.sharing.permanent import make_shared
from kvsharer_exp.model.sharing.projections import QueryRows
from kvsharer_exp.shipping.shipped_code import ship_code
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.text import shorten


def check_destination(path: Path, *, overwrite: bool) -> None:
    """Refuse a ``path`` that `write_export` would refuse, before any work is done.

    Raises:
        InputError: ``path`` is a file, or a folder that is not empty without ``overwrite``, or a
            folder that holds something other than an export, which is never replaced.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"export.path={shorten(path)} is a file: give a folder that is not there")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise InputError(
            f"export.path={shorten(path)} is not empty: give another export.path, or "
            "export.overwrite=true to replace an earlier export"
        )
    if not (path / "sharing_map.json").is_file():
        raise InputError(
            f"export.path={shorten(path)} holds something that is no export (no sharing_map.json): "
            "give another export.path"
        )


def check_model(model: Any) -> None:
    """Refuse a model whose class is not transformers' own.

    Raises:
        InputError: it is such a model; its export would need code that is not ours to ship.
    """
    name = type(model).__name__
    if getattr(transformers, name, None) is not type(model):
        raise InputError(
            f"{name} is not a class of transformers: load the model without "
            "model.trust_remote_code to export it"
        )


def write_export(
    model: Any,
    tokenizer: Any,
    sharing_map: SharingMap,
    path: Path,
    *,
    card: str,
    overwrite: bool = False,
) -> int:
    """Make ``model`` share for good and write it to ``path``; returns the bytes of its weights.

    The folder is written beside ``path`` and then renamed, so that a run which is killed leaves no
    half-written export there.

    Raises:
        InputError: see `check_destination` and `check_model`.
        SharingError: the map does not fit the model.
    """
    check_destination(path, overwrite=overwrite)
    check_model(model)
    make_shared(model, sharing_map)
    ship_code(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.partial-"
    with (
        tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as partial,
        quiet_transformers(),
    ):
        folder = Path(partial) / "new"
        folder.mkdir()  # only its owner could read the temporary folder itself
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):  # only their owner can read them
            weights.chmod((folder / "config.json").stat().st_mode)
        (folder / "sharing_map.json").write_text(sharing_map.to_json() + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
        if path.is_dir() and any(path.iterdir()):
            os.replace(path, Path(partial) / "old")
        os.replace(folder, path)
    return sum(weights.stat().st_size for weights in path.glob("*.safetensors"))


def load_exported(folder: str | Path) -> tuple[Any, Any]:
    """Load (model, tokenizer) from an export: the stock model, sharing for good.

    No code from the folder is run. The model is in eval mode, on the CPU, in the dtype in which it
    was exported.

    Raises:
        InputError: ``folder`` is not an export, or its weights do not fit its model exactly.
        SharingError: the map in ``folder`` does not fit its model.
    """
    folder = Path(folder).expanduser()
    sharing_map = _read_map(folder)
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `_fill_fused` fills the targets' fused projections
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:80]
            raise InputError(
                f"{shorten(folder)} cannot be loaded ({reason}): export it again"
            ) from error
    model, info = loaded
    stock = set(model.state_dict())
    model = make_shared(model.eval().requires_grad_(False), sharing_map)
    ship_code(model)
    held, missing = set(model.state_dict()), set(info["missing_keys"])
    rows, filled = _fill_fused(model, folder)
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    wrong = {
        "lacks": missing & held,
        "has the wrong shape of": (mismatched & held - rows) | (rows - filled - missing),
        "has besides": set(info["unexpected_keys"]) | (stock - held - missing),
    }
    for what, keys in wrong.items():
        if keys:
            raise InputError(
                f"{shorten(folder)} is not whole: it {what} {shorten(min(keys))} "
                f"({len(keys)} such); export it again"
            )
    return model, tokenizer


def _read_map(folder: Path) -> SharingMap:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{shorten(folder)} is no export, there is no config.json: give one")
    sources = json.loads(path.read_text(encoding="utf-8")).get("kv_source_layers")
    if sources is None:
        raise InputError(
            f"{shorten(folder)} is no export: its config.json has no kv_source_layers; "
            "use load_model for other models"
        )
    return SharingMap.parse(sources)


def _fill_fused(model: Any, folder: Path) -> tuple[set[str], set[str]]:
    """Read the query rows of targets' fused projections, for which the stock model has no place.

    Returns:
        The names of all such parameters, and of those that were found in ``folder``.
    """
    stubs = {name: m for name, m in model.named_modules() if isinstance(m, QueryRows)}
    parameters = {
        f"{name}.{part}": value
        for name, stub in stubs.items()
        for part, value in stub.named_parameters()
    }
    filled = set()
    for path in sorted(folder.glob("*.safetensors")) if parameters else ():
        with safe_open(path, "pt") as weights:
            for name in parameters.keys() & set(weights.keys()):
                stored = weights.get_tensor(name)
                if stored.shape == parameters[name].shape:
                    with torch.no_grad():
                        parameters[name].copy_(stored)
                    filled.add(name)
    return set(parameters), filled
