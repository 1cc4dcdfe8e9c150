"""Find the cache folder that this project writes to, and the folders of YAML files that it ships.

`model` and `data` keep downloads and conversions in `cache_dir`. The command line and `load_model`
read their YAML files from `data_dir`.
"""

from __future__ import annotations

import os
from pathlib import Path

from kvsharer_exp.values.errors import InputError


def cache_dir() -> Path:
    """Return the one folder for downloads and conversions of this project; it may not exist yet."""
    if own := os.environ.get("KVSHARER_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "kvsharer_exp"


def data_dir(name: str) -> Path:
    """Find ``conf`` or ``search_spaces`` inside the installed package or in the repository root.

    Raises:
        InputError: the folder is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_data" / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise InputError(f"folder {name!r} is missing beside the package: install kvsharer_exp again")
