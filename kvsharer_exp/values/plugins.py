"""Find the parts that other packages bring: search spaces, samplers and scorers.

`make_space`, `make_sampler` and `find_fitness` look up their names here.

A package registers a part as an entry point in one of three groups: ``kvsharer_exp.search_spaces``,
``kvsharer_exp.samplers`` or ``kvsharer_exp.scorers``. Once the package is installed, the name of
its part works like one of our own names. Our own names come first, so a package cannot replace
them. tests/plugin_example/ is such a package.
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
    """Return ``ours[name]``, or else what the entry point ``name`` of ``group`` loads.

    ``key`` is the configuration key that error messages name.

    Raises:
        InputError: there is no such part, several packages bring one of this name, or the part
            cannot be loaded.
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
    except Exception as error:  # the import of the other package may raise anything
        reason = shorten(f"{type(error).__name__}: {error}", 60, placeholder=" …")
        raise InputError(
            f"{key}={name}: entry point {found[0].value} of package {packages[0]} "
            f"cannot be loaded ({reason}): repair or uninstall it"
        ) from error


@contextmanager
def options_for(part: str, *refusals: type[Exception], see: str) -> Iterator[None]:
    """Report the errors ``refusals`` raised inside as options that ``part`` does not take.

    Raises:
        InputError: one of ``refusals`` was raised; the message points to the folder ``see``, which
            shows the options that the part takes.
    """
    try:
        yield
    except InputError:  # its message names the option already
        raise
    except refusals as error:
        raise InputError(f"{part} does not take these options ({error}): see {see}") from error
