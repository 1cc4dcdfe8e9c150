"""The description of a model to load: which weights, and how they are held (dtype, device).

Commands make a `ModelSpec` from the config and `load_model` makes one from a name; `load` reads it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kvsharer_exp.values.errors import InputError

DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Says which weights to load, and how to hold them.

    ``device`` is auto (CUDA when there is one), cpu, cuda or cuda:N. ``device_map`` is accelerate's
    setting; where it is given, ``device`` is not used. ``add_bos_token`` says whether texts begin
    with BOS; None leaves it to the tokenizer. ``seed`` is that of random weights.

    Raises:
        InputError: the dtype is unknown, the source is empty, or ``device_map`` and a ``device``
            are both given. `device_of` refuses a device that is not there.
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


def model_id(spec: ModelSpec) -> str:
    """Return the hub id, ``wheel:…``, ``random:…`` or a file's name, without any local path."""
    if spec.source.startswith(("wheel:", "random:")):
        return spec.source
    if is_local(spec.source):
        return Path(spec.source).name
    return spec.source.removeprefix("hub:")


def is_local(source: str) -> bool:
    """Whether ``source`` is a ``.gguf`` file, a path or an existing folder, and so no hub id.

    With ``hub:`` in front it never is, whatever there is of that name.
    """
    if source.startswith("hub:"):
        return False
    return source.endswith(".gguf") or source.startswith(("/", ".", "~")) or Path(source).is_dir()


def hub_id(source: str) -> str | None:
    """Return the id of the model hub, like ``Qwen/Qwen3-8B``, that ``source`` can only be.

    It is None where ``source`` is something else.
    """
    name = source.removeprefix("hub:")
    return name if not is_local(source) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


def device_of(spec: ModelSpec) -> str:
    """Return the device that ``spec`` asks for, as torch writes it.

    Raises:
        InputError: the device is unknown, or it is CUDA and there is none.
    """
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
