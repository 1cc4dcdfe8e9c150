"""The groups of the configuration and their choices: files of ``conf/`` and of a user's folders.

A user's folder is given with ``--config-dir`` or ``hydra.searchpath``. It holds a folder for each
group, with files like ``model/mine.yaml``. `translate` looks up the names of a command line here,
``--help`` and the completion list them, and ``doctor`` looks at every model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from kvsharer_exp.model.folders import data_dir


def group_folders(search_path: Iterable[str] = ()) -> list[Traversable]:
    """Our ``conf/``, and the folders of ``search_path`` that are there.

    An entry is ``file:///folder``, ``pkg://package.folder``, or the path of a folder.
    """
    return [data_dir("conf"), *(place for entry in search_path for place in _folder(entry))]


def groups(search_path: Iterable[str] = ()) -> Mapping[str, Sequence[str]]:
    """The choices of each group by its name: ours, and those in the folders of ``search_path``."""
    folders = group_folders(search_path)
    names = {place.name for folder in folders for place in folder.iterdir()}
    found = {name: set(group_files(name, folders)) for name in sorted({*names, "search_space"})}
    found["search_space"].update(path.stem for path in data_dir("search_spaces").glob("*.yaml"))
    return {name: sorted(choices) for name, choices in found.items() if choices}


def group_files(group: str, folders: Sequence[Traversable]) -> Mapping[str, Traversable]:
    """The files of a group by the name of the choice; the first folder that has a name wins."""
    found: dict[str, Traversable] = {}
    for folder in folders:
        for name, file in _choices(folder / group):
            found.setdefault(name, file)
    return dict(sorted(found.items()))


def _folder(entry: str) -> list[Traversable]:
    scheme, found, rest = entry.partition("://")
    if not found:
        scheme, rest = "file", entry
    try:
        folder = files(rest) if scheme == "pkg" else Path(rest)
    except (ModuleNotFoundError, ValueError):  # Hydra warns of a package that is not there
        return []
    return [folder] if scheme in ("pkg", "file") and folder.is_dir() else []


def _choices(folder: Traversable, before: str = "") -> Iterator[tuple[str, Traversable]]:
    """Every YAML file below ``folder``, under a name like ``mine`` or ``inner/mine``."""
    for place in folder.iterdir() if folder.is_dir() else ():
        if place.is_dir():
            yield from _choices(place, f"{before}{place.name}/")
        elif place.name.endswith(".yaml"):
            yield before + place.name.removesuffix(".yaml"), place
