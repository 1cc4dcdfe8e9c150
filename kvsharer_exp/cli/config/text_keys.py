"""Which keys of the configuration take text, and what their text may mean.

`quoting` writes the text of these keys for Hydra, and `to_config` expands ``~`` in those that are
paths. `text_keys` makes the list from the schema: every field whose type is text, and every field
that carries one of the markers below. So a new key of text needs no line here; a new key that may
be a path needs ``field(metadata=PATH)``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

PATH = {"path": True}
"""Marks a text that may be a path, so that a ``~`` at its start is the home folder."""

PATHS = {"path": True, "several": True}
"""Marks a key of any type that takes one such text or a list of them."""

VERBATIM = {"verbatim": True}
"""Marks a text in which nothing has a meaning to Hydra, neither ``null`` nor ``${seed}``."""


@dataclass(frozen=True, slots=True)
class TextKey:
    """How the text of a key is read.

    Args:
        path: it may be a path, see `PATH`.
        several: it is a list of texts, or may be one.
        verbatim: nothing in it has a meaning, see `VERBATIM`.
        only: the type of the key is text. A key of another type has a marker, and also takes what
            is no text, like ``map=[0,1,0,3]``.
        early: Hydra itself uses it, before `to_config` could expand the ``~``.
    """

    path: bool = False
    several: bool = False
    verbatim: bool = False
    only: bool = True
    early: bool = False


def text_keys(group: type[Any], prefix: str = "") -> dict[str, TextKey]:
    """Every key of the dataclass ``group`` that takes text, in its dotted form after ``prefix``."""
    found: dict[str, TextKey] = {}
    types = get_type_hints(group)
    for item in fields(group):
        key, kind = prefix + item.name, types[item.name]
        if isinstance(kind, type) and is_dataclass(kind):
            found |= text_keys(kind, f"{key}.")
        elif _holds_text(kind) or item.metadata:
            many = get_origin(kind) is list or bool(item.metadata.get("several"))
            path, verbatim = (bool(item.metadata.get(name)) for name in ("path", "verbatim"))
            found[key] = TextKey(path, many, verbatim, only=_holds_text(kind))
    return found


def _holds_text(kind: Any) -> bool:
    """Whether a type is ``str``, ``str | None`` or ``list[str]``."""
    return kind is str or (get_origin(kind) in (UnionType, Union, list) and str in get_args(kind))


def expand_home(text: str) -> str:
    """Replace a ``~`` at the start of a path; ``sqlite:///`` or ``file://`` may stand before it."""
    scheme = re.match(r"(sqlite:///|file://)?", text)[0]  # type: ignore[index]
    if "\0" in text:  # Python refuses to look for such a home folder
        return text
    return scheme + os.path.expanduser(text[len(scheme) :])


def literal(text: str, references: Collection[str] = ()) -> str:
    """Escape ``${`` for OmegaConf, which takes ``${name}`` for a reference to another value.

    ``references``: the first words of references that stay references, like ``oc`` for
    ``${oc.env:HOME}``.
    """

    def escaped(match: re.Match[str]) -> str:
        return match[0] if match[2] in references else rf"{match[1] * 2}\${{{match[2] or ''}"

    return re.sub(r"(\\*)\$\{(\w+(?=[.:}]))?", escaped, text)
