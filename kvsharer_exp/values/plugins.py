"""Parts that other packages bring, by entry point: search spaces, samplers, scorers.

A package names its part in a group of ours (``kvsharer_exp.search_spaces``,
``kvsharer_exp.samplers``, ``kvsharer_exp.scorers``); once it is installed the name works like one
of our own. Ours come first: a package cannot replace them. tests/plugin_example/ is such a package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from textwrap import shorten
from typing import TypeVar, cast

from kvsharer_exp.values.errors import InputError, did_you_mean

Part = TypeVar("Part")


def find_part(name: str, ours: Mapping[str, Part], *, group: str, key: str) -> Part:
    """``ours[name]``, or what the entry point ``name`` of ``group`` loads; ``key`` is for messages.

    Raises:
        InputError: no such part, two packages that bring one of this name, or one that cannot be
            loaded.
    """
    if name in ours:
        return ours[name]
    installed = entry_points(group=group)
    found = list(installed.select(name=name))
    if not found:
        hint = did_you_mean(name, (*ours, *sorted(installed.names)))
        raise InputError(f"{key}={name} is unknown: {hint}")
    packages = sorted(entry.dist.name if entry.dist else "?" for entry in found)
    if len(packages) > 1:
        raise InputError(f"{key}={name} is brought by {', '.join(packages)}: uninstall all but one")
    try:
        return cast(Part, found[0].load())
    except Exception as error:  # whatever the other package raises as it is imported
        reason = shorten(f"{type(error).__name__}: {error}", 60, placeholder=" …")
        raise InputError(
            f"{key}={name}: entry point {found[0].value} of package {packages[0]} "
            f"cannot be loaded ({reason}): repair or uninstall it"
        ) from error


@contextmanager
def options_for(part: str, *refusals: type[Exception], see: str) -> Iterator[None]:
    """``refusals`` raised inside say that ``part`` does not take its options.

    Raises:
        InputError: so, and that the folder ``see`` holds those it takes.
    """
    try:
        yield
    except InputError:  # names the option itself
        raise
    except refusals as error:
        raise InputError(f"{part} does not take these options ({error}): see {see}") from error
