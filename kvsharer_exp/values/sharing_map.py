"""The sharing map: for every decoder layer, the layer whose keys and values its attention reads.

Nearly every part of the package takes or returns maps as `SharingMap`.

A map is one source per layer, which transformers calls ``kv_source_layers``. A source never comes
after its target (``sources[i] <= i``), and every source owns its KV
(``sources[sources[i]] == sources[i]``).

Method: KVSharer, https://arxiv.org/abs/2410.18517. The short text form ``0_1_0_3`` follows LCKV.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan_files import json_of_file, json_of_text
from kvsharer_exp.values.text import clip, read_integer
from kvsharer_exp.values.text_files import read_json

_EMPTY = "map is empty: give one source layer per layer, like 0_1_0_3"


class SharingMapError(InputError):
    """A map breaks a rule; the message names the value, the rule and the way out."""


@dataclass(frozen=True, slots=True)
class SharingMap:
    """One source layer per layer; ``kv_source_layers[i] == i`` means layer ``i`` owns its KV.

    Raises:
        SharingMapError: the map is empty or is no sequence of integers, or a source is negative,
            comes after its target, or itself reads another layer.
    """

    kv_source_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        sources = self.kv_source_layers
        if isinstance(sources, (str, bytes)) or not isinstance(sources, Iterable):
            raise SharingMapError(
                f"map {clip(repr(sources))} is not a sequence: give one source layer per layer, "
                "or use SharingMap.parse for text"
            )
        sources = tuple(_index(source, layer) for layer, source in enumerate(sources))
        if not sources:
            raise SharingMapError(_EMPTY)
        for layer, source in enumerate(sources):
            if source < 0:
                raise SharingMapError(
                    f"source {clip(str(source), 20)} of layer {layer} is negative: give 0 or more"
                )
            if source > layer:
                raise SharingMapError(
                    f"layer {layer} reads layer {clip(str(source), 20)}, which comes after it: "
                    f"give a source of at most {layer}"
                )
            if sources[source] != source:
                raise SharingMapError(
                    f"layer {layer} reads layer {source}, which does not own its KV "
                    f"(it reads layer {sources[source]}): name {sources[source]} instead"
                )
        object.__setattr__(self, "kv_source_layers", sources)

    @classmethod
    def identity(cls, num_layers: int) -> SharingMap:
        """The map of the full cache: every one of ``num_layers`` layers owns its KV."""
        return cls(tuple(range(num_layers)))

    @classmethod
    def parse(cls, value: str | Path | Sequence[int] | SharingMap) -> SharingMap:
        """Read ``"0_1_0_3"``, ``"[0, 1, 0, 3]"``, a path to a ``.json`` file, or a sequence.

        Some files hold several maps: ``front.json``, and the ``result.json`` of a sweep or search.
        There the number of shared layers names one of the maps: ``"front.json:4"``.

        Raises:
            SharingMapError: ``value`` is none of these, or not a valid map.
            PlanFileError: it names a file without such a map.
        """
        if isinstance(value, SharingMap):
            return value
        if isinstance(value, Path):
            return cls.from_json(json_of_file(value))
        if not isinstance(value, str):
            return cls(value)  # type: ignore[arg-type]
        text = value.strip()
        if (held := json_of_text(text)) is not None:
            return cls.from_json(held)
        if text.startswith(("[", "{")):
            return cls.from_json(text)
        if not text:
            raise SharingMapError(_EMPTY)
        try:
            return cls(tuple(read_integer(part) for part in text.split("_")))
        except SharingMapError:
            raise
        except ValueError as error:
            raise SharingMapError(
                f"map {clip(text)!r} is neither 0_1_0_3 nor [0,1,0,3] nor a path ending in "
                ".json: give one integer per layer"
            ) from error

    @classmethod
    def from_json(cls, text: str) -> SharingMap:
        """Read a JSON list like ``[0, 1, 0, 3]``, or an object that holds ``kv_source_layers``.

        Raises:
            SharingMapError: ``text`` is not JSON, lacks the key, or is not a valid map.
        """
        try:
            value: Any = read_json(text)
        except json.JSONDecodeError as error:
            place = f"in line {error.lineno}" if "\n" in text else f"at character {error.pos}"
            raise SharingMapError(
                f"map {clip(text)!r} is not JSON ({error.msg} {place}): "
                'give {"kv_source_layers": [0, 1, 0, 3]}'
            ) from error
        if isinstance(value, dict):
            sources, plan = value.get("kv_source_layers"), value.get("plan")
            if sources is None and isinstance(plan, str):  # a result of a plan that is no map
                raise SharingMapError(
                    f"map JSON holds a KV plan, {clip(plan)}: give it with plan= instead of map="
                )
            if "kv_source_layers" not in value:
                raise SharingMapError(
                    'map JSON has no key kv_source_layers: give {"kv_source_layers": [0, 1, 0, 3]}'
                )
            value = value["kv_source_layers"]
        if not isinstance(value, list):
            raise SharingMapError(
                f"kv_source_layers is {type(value).__name__}, not a list: "
                "give one source layer per layer"
            )
        return cls(tuple(value))

    def to_json(self) -> str:
        """Write ``{"kv_source_layers": [...]}``, which ``from_json`` reads back."""
        return json.dumps({"kv_source_layers": list(self.kv_source_layers)})

    def __str__(self) -> str:
        return "_".join(map(str, self.kv_source_layers))

    def share(self, target: int, source: int) -> SharingMap:
        """Return the map in which ``target`` reads ``source``; chains are resolved.

        If ``source`` reads another layer, ``target`` reads that owner. Layers that read ``target``
        follow it to the same owner. In KVSharer's notation: after i→j and then j→k, i reads k.

        Raises:
            SharingMapError: a layer is out of range, or the source is not before the target.
        """
        for layer in (target, source):
            if not 0 <= layer < self.num_layers:
                raise SharingMapError(
                    f"layer {layer} is outside the map: layers go from 0 to {self.num_layers - 1}"
                )
        if source >= target:
            raise SharingMapError(
                f"layer {target} cannot read layer {source}: name a source before its target"
            )
        owner = self.kv_source_layers[source]
        return SharingMap(
            tuple(
                owner if layer == target or old == target else old
                for layer, old in enumerate(self.kv_source_layers)
            )
        )

    @property
    def num_layers(self) -> int:
        return len(self.kv_source_layers)

    @property
    def targets(self) -> tuple[int, ...]:
        """The layers that read another layer's KV, ascending."""
        return tuple(i for i, source in enumerate(self.kv_source_layers) if source != i)

    @property
    def owners(self) -> tuple[int, ...]:
        """The layers that keep their own KV, ascending."""
        return tuple(i for i, source in enumerate(self.kv_source_layers) if source == i)

    @property
    def compression(self) -> float:
        """The number of targets divided by the number of layers, in [0, 1)."""
        return len(self.targets) / self.num_layers

    @property
    def digest(self) -> str:
        """12 hex characters that identify the map."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:12]


def _index(source: Any, layer: int) -> int:
    """Turn any integer type, numpy's too, into a plain ``int``; a bool is refused."""
    if not isinstance(source, bool):
        try:
            return operator.index(source)
        except TypeError:
            pass
    raise SharingMapError(
        f"source {clip(repr(source))} of layer {layer} is not an integer: give a layer index"
    )
