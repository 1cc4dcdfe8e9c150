"""The cache folder this project writes to, and the folders of YAML files it ships."""

from __future__ import annotations

import os
from pathlib import Path

from kvsharer_exp.values.errors import InputError


def cache_dir() -> Path:
    """The one folder this project writes downloads and conversions to (it may not exist yet)."""
    if own := os.environ.get("KVSHARER_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "kvsharer_exp"


def data_dir(name: str) -> Path:
    """``conf`` or ``search_spaces``: beside the installed package, else in the repository root.

    Raises:
        InputError: in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_data" / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise InputError(f"folder {name!r} is missing beside the package: install kvsharer_exp again")
