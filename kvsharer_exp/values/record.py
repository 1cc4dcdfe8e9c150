"""The base class of the frozen values: a JSON round trip for dataclasses, tuples and maps."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Self

from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap


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
        hints = typing.get_type_hints(cls)
        return cls(**{name: _typed(hints[name], value) for name, value in data.items()})

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls.from_dict(json.loads(text))


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


def _typed(hint: Any, value: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _typed(next(arg for arg in args if arg is not type(None)), value)
    if hint is SharingMap:
        return SharingMap(tuple(value))
    if hint is KVPlan:
        return KVPlan.parse(value)
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_dict(value)
    if origin is tuple:
        return tuple(_typed(args[0], item) for item in value)
    if origin is Mapping:
        return dict(value)
    return value
