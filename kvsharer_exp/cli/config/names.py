"""Names that become names of files and folders, such as ``study.name``.

The groups of the configuration check theirs with `check_file_name`. `model_prefix` is for the name
of the run folder, which Hydra makes before the configuration is checked.
"""

from __future__ import annotations

import unicodedata

from omegaconf import DictConfig

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import shorten

WITHOUT_MODEL = ("doctor", "reproduce", "report", "serve", "status", "ui")
"""The commands that load no model which the command line names."""

_MOST_BYTES = 120  # a file name has at most 255, and a study's holds more than the model's name


def check_file_name(key: str, name: str) -> None:
    """Refuse a ``name`` that cannot be part of a file's name.

    Raises:
        InputError: the name is empty, ``.`` or ``..``, or `file_name` would change it; the message
            names ``key`` and ``name``.
    """
    if len(name.encode()) > _MOST_BYTES:
        raise InputError(f"{key}={shorten(name)!r} is too long: give at most {_MOST_BYTES} bytes")
    if name in ("", ".", "..") or file_name(name) != name:
        raise InputError(f"{key}={shorten(name)!r}: give a name without a slash, on one line")


def file_name(name: str) -> str:
    """Cut a name to 120 bytes of UTF-8, and put ``_`` for slashes and control characters."""
    safe = "".join("_" if c == "/" or unicodedata.category(c) == "Cc" else c for c in name)
    return safe.encode()[:_MOST_BYTES].decode(errors="ignore")


def model_prefix(*, _root_: DictConfig) -> str:
    """The model's name and a dash, for the run folder; empty if the command does not load it.

    ``_root_``: the whole configuration, which OmegaConf gives to the parameter of this name.
    """
    command = _root_.command
    of_run = command == "plan" and _root_.run is not None  # whose model may be another
    return "" if of_run or command in WITHOUT_MODEL else f"{file_name(_root_.model.name)}-"
