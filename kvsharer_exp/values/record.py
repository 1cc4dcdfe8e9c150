"""The base class of the frozen values: a JSON round trip for dataclasses, tuples and maps."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, Self

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.text import clip
from kvsharer_exp.values.text_files import read_json


class Record:
    """Gives a dataclass that inherits it ``to_dict``, ``from_dict``, ``to_json``, ``from_json``.

    A `SharingMap` becomes a list of its sources, a `KVPlan` its text; ``to_json`` raises ValueError
    for NaN or infinity.
    """

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` gave.

        Raises:
            InputError: see `typed`.
        """
        hints, needed = _shape(cls)  # type: ignore[arg-type]
        if not isinstance(data, Mapping):
            raise RecordError(cls.__name__, "its fields", data)
        for name in data:
            if name not in hints:
                raise RecordError(cls.__name__, "no other field", name)
        for name in needed - data.keys():
            raise RecordError(cls.__name__, f"a field {name}", sorted(data))
        return cls(**{name: typed(hints[name], value, name) for name, value in data.items()})

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` gave.

        Raises:
            InputError: it is not JSON, or see `typed`.
        """
        try:
            data = read_json(text)
        except json.JSONDecodeError as error:
            raise RecordError(cls.__name__, "JSON", text) from error
        return cls.from_dict(data)


class RecordError(InputError):
    """JSON is not what was written there."""

    def __init__(self, name: str, what: str, found: Any) -> None:
        found = clip(repr(found), 40)
        super().__init__(f"{name} holds {found}: give {what}, or make the file again")


def _plain(value: Any) -> Any:
    if isinstance(value, SharingMap):
        return list(value.kv_source_layers)
    if isinstance(value, KVPlan):
        return str(value)
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


@cache
def _shape(cls: type[Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of the fields of a record, and the names of those without a default."""
    given = (MISSING, MISSING)
    needed = (f.name for f in fields(cls) if f.init and (f.default, f.default_factory) == given)
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}, frozenset(needed)


def typed(hint: Any, value: Any, name: str) -> Any:
    """The JSON ``value`` as what ``hint`` says: a record, a plan, or plain values in containers.

    ``name`` says in a message whose value it is.

    Raises:
        InputError: it is of another type, or a number is not finite.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in args:
            return None
        return typed(next(arg for arg in args if arg is not types.NoneType), value, name)
    if hint is SharingMap and isinstance(value, list):
        return SharingMap(tuple(value))
    if hint is KVPlan and isinstance(value, (str, list, tuple)):
        return KVPlan.parse(value)
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_dict(value)
    if origin in (tuple, list) and isinstance(value, (tuple, list)):
        return origin(typed(args[0], item, name) for item in value)
    if origin in (Mapping, dict) and isinstance(value, Mapping):
        return {key: typed(args[1], item, name) for key, item in value.items()}
    if hint is Any or (origin is typing.Literal and value in args):
        return value
    if hint is bool or not isinstance(value, bool):
        if hint in (str, bool) and isinstance(value, hint):
            return value
        numbers = (int, float) if hint is float else (int,)
        if hint in (int, float) and isinstance(value, numbers) and _is_finite(value):
            return value
    raise RecordError(name, _WORDS.get(hint, "what belongs there"), value)


_WORDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a finite number"}


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False
