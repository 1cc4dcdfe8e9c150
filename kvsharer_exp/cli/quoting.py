"""Write text from the command line so that Hydra reads it as it was typed.

`translate` passes every override through `as_typed`. Hydra has a grammar for what follows the
``=``: commas, brackets, quotes and letters with accents have a meaning or are refused, and ``1e3``
is a number (https://hydra.cc/docs/advanced/override_grammar/basic). The value of a key that takes
text (`text_keys`) is put into quotes, unless Hydra reads it as typed anyway. Text that the user has
put into Hydra's quotes keeps them.
"""

from __future__ import annotations

import re
from dataclasses import fields
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.errors import HydraException

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.config.text_keys import TextKey, expand_home, literal, text_keys

_HYDRAS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
_KEYS = {
    **text_keys(Config),
    **dict.fromkeys(_HYDRAS, TextKey(path=True, early=True)),
    "hydra.searchpath": TextKey(path=True, several=True, early=True),
}
_REFERENCES = {*(field.name for field in fields(Config)), "hydra", "oc", "now", "pid"}
_QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
_PIECE = re.compile(rf"\s*(?:{_QUOTED})\s*(?=,|$)|(?:\\,|[^,])*", re.DOTALL)


def as_typed(override: str, *, sweep: bool) -> str:
    """Write ``key=text`` so that ``key`` is given ``text``; any other override stays as it is.

    ``sweep``: with ``-m``, where commas stand between values.
    """
    key, _, value = override.partition("=")
    kind = _KEYS.get(key.lstrip("+"))
    written = None if kind is None else _value(value, kind, sweep=sweep)
    return override if written is None else f"{key}={written}"


def value_of(override: str) -> Any:
    """What Hydra reads after the ``=`` of an override; None if it cannot read it."""
    parsed = _parsed(override.partition("=")[2])
    return None if parsed is None else parsed.value()


def names_only(override: str) -> bool:
    """Whether an override can name choices of a group: it gives text, or a list of texts.

    What Hydra cannot read, or reads as several values for ``-m``, is left to Hydra.
    """
    parsed = _parsed(override.partition("=")[2])
    if parsed is None or parsed.is_sweep_override():
        return True
    value = parsed.value()
    return all(isinstance(name, str) for name in (value if isinstance(value, list) else [value]))


def pieces(value: str) -> list[str]:
    r"""Split ``a,'b,c',d\,e`` at the commas that are not in quotes and have no ``\``."""
    found: list[str] = []
    end = -1
    while end < len(value):
        match = _PIECE.match(value, end + 1)
        assert match is not None  # the empty text matches too
        found.append(match[0].strip())
        end = match.end()
    return found


def in_quotes(text: str) -> str:
    """Write any text as Hydra's grammar wants it."""
    return QuotedString(text, Quote.single).with_quotes()


def _value(value: str, kind: TextKey, *, sweep: bool) -> str | None:
    """Write what follows the ``=``; None leaves it as it is, for Hydra to read or to refuse."""
    if kind.several and value.startswith("["):
        lists = re.split(r"(?<=\])\s*,\s*(?=\[)", value) if sweep else [value]
        inner = [_joined(text.strip()[1:-1], kind) for text in lists if text.rstrip().endswith("]")]
        complete = len(inner) == len(lists) and None not in inner
        return ",".join(f"[{text}]" for text in inner) if complete else None
    if kind.several and kind.only:
        return None
    if sweep:
        return None if _is_function(value) else _joined(value, kind)
    if value.startswith("[") and not kind.only:
        return None
    if kind.several and len(pieces(value)) > 1:
        joined = _joined(value, kind)
        return None if joined is None else f"[{joined}]"
    return _text(value, kind)


def _is_function(value: str) -> bool:
    """Whether ``value`` is one of Hydra's functions that make several values: ``choice(a,b)``."""
    parsed = _parsed(value)
    plain = (ValueType.ELEMENT, ValueType.SIMPLE_CHOICE_SWEEP)
    return parsed is not None and parsed.value_type not in plain


def _joined(value: str, kind: TextKey) -> str | None:
    r"""Write every piece of ``value``, but those with a ``\,``; None leaves all of it.

    One of several may not be empty, and in a key that takes more than text, none may be a list.
    """
    found = pieces(value)
    if len(found) > 1 and not all(found):
        return None
    if not kind.only and any(piece.startswith("[") for piece in found):
        return None
    return ",".join(piece if r"\," in piece else _text(piece, kind) for piece in found)


def _text(text: str, kind: TextKey) -> str:
    parsed = _parsed(text)
    quoted = None if parsed is None else parsed._value
    if isinstance(quoted, QuotedString) and text[0] in "'\"":
        path = expand_home(quoted.text) if kind.early else quoted.text
        return text if path == quoted.text else in_quotes(path)
    if text.lower() == "null" and not kind.verbatim:
        return text
    meant = expand_home(text) if kind.early else text
    if kind.only:  # what is no text may be a reference of any kind
        meant = literal(meant, () if kind.verbatim else _REFERENCES)
    same = meant == text and parsed is not None and parsed.value() == text
    # A bracket or comma after "\" would lose its meaning.
    return text if same and text[-1:] != "\\" else in_quotes(meant)


def _parsed(value: str) -> Override | None:
    try:
        return _parser().parse_override(f"key={value}")
    except HydraException:
        return None


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()
