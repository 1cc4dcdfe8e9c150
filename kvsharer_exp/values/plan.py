"""The KV plan: for every decoder layer, what it does about its keys and values.

A plan is one `Action` a layer: own, read, drop, constant, affine, …. A sharing map is the plan
whose actions are all "own in 16 bits" or "read", and it prints, digests and stores as the map does.
Whatever runs, scores or searches plans takes them as `KVPlan`.

>>> str(KVPlan.parse("0_1q4s4_0_a").replace(1, Own()))
'0_1_0_a'
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.actions.read import Read
from kvsharer_exp.values.actions.registry import action_from_dict, read_action
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan_files import json_of_file, json_of_text
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.text import clip, shorten
from kvsharer_exp.values.text_files import read_json


class KVPlanError(InputError):
    """A plan breaks a rule; the message names the layer, the rule and the way out."""


@dataclass(frozen=True, slots=True)
class KVPlan:
    """One action a layer, each in its simplest form.

    ``texts`` are those of the actions. ``key_sources`` and ``value_sources`` name for every layer
    the one whose keys and values it reads: itself if it owns them, None without an attention.

    Raises:
        KVPlanError: there are no actions, a layer reads a later one or one that does not own what
            is read, or no layer owns its KV.
    """

    actions: tuple[Action, ...]
    texts: tuple[str, ...] = field(init=False, repr=False, compare=False)
    key_sources: tuple[int | None, ...] = field(init=False, repr=False, compare=False)
    value_sources: tuple[int | None, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        actions = self.actions
        if isinstance(actions, Action) or not isinstance(actions, Iterable):
            raise KVPlanError(
                f"plan {clip(repr(actions))} is no sequence of actions: give one a layer"
            )
        actions = tuple(actions)
        for layer, action in enumerate(actions):
            if not isinstance(action, Action):
                raise KVPlanError(
                    f"layer {layer} has {clip(repr(action))}, which is no action: "
                    "give Own(), Read(0), …, or use KVPlan.parse for text"
                )
        actions = tuple(action.canonical(layer) for layer, action in enumerate(actions))
        object.__setattr__(self, "actions", actions)
        each = list(enumerate(actions))
        object.__setattr__(self, "texts", tuple(a.text(i) for i, a in each))
        object.__setattr__(self, "key_sources", tuple(a.keys_from(i) for i, a in each))
        object.__setattr__(self, "value_sources", tuple(a.values_from(i) for i, a in each))
        for half, sources in (("keys", self.key_sources), ("values", self.value_sources)):
            for layer, source in enumerate(sources):
                _check_source(half, layer, source, sources)
        _check_halves(self)
        if not self.owners:
            raise KVPlanError(
                "no layer of the plan owns its KV: make one keep it, the sequence length is held "
                "there"
            )

    @classmethod
    def full(cls, num_layers: int) -> KVPlan:
        """The plan of the full cache: every one of ``num_layers`` layers owns its KV."""
        return cls((Own(),) * num_layers)

    @classmethod
    def of(cls, value: KVPlan | SharingMap) -> KVPlan:
        """``value`` as a plan."""
        if isinstance(value, KVPlan):
            return value
        sources = value.kv_source_layers
        return cls(
            tuple(Own() if i == source else Read(source) for i, source in enumerate(sources))
        )

    @classmethod
    def parse(cls, value: str | Path | Sequence[Any] | SharingMap | KVPlan) -> KVPlan:
        """Read ``"0_1q4_0_a"``, whatever `SharingMap.parse` reads, JSON, or a sequence of actions.

        Files hold a plan or a map, or several of them. ``"front.json:0.25"`` names the best plan
        that keeps at most this fraction of the KV, ``"front.json:4"`` the map of 4 shared layers.

        Raises:
            KVPlanError: ``value`` is none of these, or not a valid plan.
            PlanFileError: it names a file without such a plan.
            SharingMapError: it has the form of a map, but is not a valid one.
        """
        if isinstance(value, (KVPlan, SharingMap)):
            return cls.of(value)
        if isinstance(value, str):
            text = value.strip()
            if not text:
                raise KVPlanError("plan is empty: give what each layer does, like 0_1q4_0_3")
            if text.startswith("{"):
                return cls.from_json(text)
            in_file = json_of_text(text)
            if in_file is not None:
                return cls.from_json(in_file)
            if "/" in text:
                raise KVPlanError(
                    f"plan {shorten(text)!r} is neither text nor the path of a .json: give "
                    "0_1q4_0_3 or FILE.json; load_plan and plan= also take folders"
                )
            if re.search("[a-z]", text) and not text.startswith("["):
                return cls._read(text.split("_"))
        elif isinstance(value, Path):
            return cls.from_json(json_of_file(value))
        elif isinstance(value, Iterable):
            items = tuple(value)
            if any(isinstance(item, Action) for item in items):
                return cls(items)
        return cls.of(SharingMap.parse(value))

    @classmethod
    def _read(cls, texts: Sequence[str]) -> KVPlan:
        actions = []
        for layer, text in enumerate(texts):
            try:
                action = read_action(text, layer)
            except InputError as error:
                raise KVPlanError(_at(layer, text, str(error))) from error
            if action is None:
                raise KVPlanError(
                    f"layer {layer} has {clip(text, 20)!r}, which is no action: give {layer}, "
                    f"{layer}q4w4+60, an earlier one like 0, 0k1v, x (drop), c or a"
                )
            actions.append(action)
        return cls(tuple(actions))

    @classmethod
    def from_json(cls, text: str) -> KVPlan:
        """Read an object that holds ``actions``, ``plan`` or, as of a map, ``kv_source_layers``.

        Raises:
            KVPlanError: it holds no valid plan.
            SharingMapError: it is not JSON, has none of the keys, or holds no valid map.
        """
        try:
            data = read_json(text)
        except json.JSONDecodeError:
            return cls.of(SharingMap.from_json(text))  # which says what is wrong with it
        held = data if isinstance(data, dict) else {}
        actions = held.get("actions")
        if isinstance(actions, list) and all(isinstance(action, dict) for action in actions):
            return cls(tuple(_from_dict(layer, action) for layer, action in enumerate(actions)))
        for key in ("plan", "kv_plan"):
            if isinstance(held.get(key), str):
                return cls._read(held[key].strip().split("_"))
        wrong = [key for key in ("plan", "kv_plan", "actions") if key in held]
        if wrong and "kv_source_layers" not in held:
            raise KVPlanError(
                f"plan JSON has {clip(repr(held[wrong[0]]), 30)} as its {wrong[0]}: give what each "
                'layer does as text, like {"plan": "0_1q4_0_3"}'
            )
        return cls.of(SharingMap.from_json(text))

    def to_json(self) -> str:
        """Write what `from_json` reads back: of a map, the same as the map writes."""
        if self.sharing_map is not None:
            return self.sharing_map.to_json()
        actions = [action.to_dict() for action in self.actions]
        return json.dumps({"plan": str(self), "actions": actions})

    def __str__(self) -> str:
        return "_".join(self.texts)

    def replace(self, layer: int, action: Action) -> KVPlan:
        """The plan in which ``layer`` does ``action``; chains are resolved.

        What ``action`` reads from a layer that reads itself, it reads from that layer's source.
        Layers that read ``layer`` follow it to its new sources.

        Raises:
            KVPlanError: ``layer`` is out of range, or the new plan breaks a rule, as when other
                layers read one that is dropped.
        """
        if not 0 <= layer < self.num_layers:
            raise KVPlanError(
                f"layer {layer} is outside the plan: layers go from 0 to {self.num_layers - 1}"
            )
        actions = list(self.actions)
        actions[layer] = action
        for reader in range(layer, self.num_layers):
            actions[reader] = _resolved(reader, actions)
        return KVPlan(tuple(actions))

    @property
    def num_layers(self) -> int:
        return len(self.actions)

    @property
    def owners(self) -> tuple[int, ...]:
        """The layers that keep keys and values of their own, ascending."""
        pairs = enumerate(zip(self.key_sources, self.value_sources, strict=True))
        return tuple(layer for layer, sources in pairs if sources == (layer, layer))

    @property
    def targets(self) -> tuple[int, ...]:
        """The layers that read keys or values of another layer, ascending."""
        pairs = enumerate(zip(self.key_sources, self.value_sources, strict=True))
        return tuple(i for i, read in pairs if any(s is not None and s != i for s in read))

    @property
    def sharing_map(self) -> SharingMap | None:
        """The sharing map that this plan is; None when it does more than owning and reading."""
        if all(text.isdecimal() for text in self.texts):
            return SharingMap(tuple(int(text) for text in self.texts))
        return None

    @property
    def digest(self) -> str:
        """12 hex characters that identify the plan; those of the map if it is one."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:12]


def _at(layer: int, text: str, why: str) -> str:
    return f"layer {layer} has {clip(text, 20)!r}: {why}"


def _from_dict(layer: int, data: dict[str, Any]) -> Action:
    try:
        return action_from_dict(data)
    except InputError as error:
        raise KVPlanError(_at(layer, str(data), str(error))) from error


def _check_source(
    half: str, layer: int, source: int | None, sources: tuple[int | None, ...]
) -> None:
    if source is None or source == layer:
        return
    if isinstance(source, bool) or not isinstance(source, Integral):
        raise KVPlanError(
            f"layer {layer} reads the {half} of layer {clip(repr(source), 20)}: give a whole number"
        )
    if not 0 <= source < layer:
        raise KVPlanError(
            f"layer {layer} reads the {half} of layer {clip(str(source), 20)}: "
            "give an earlier layer, 0 or more"
        )
    owner = sources[source]
    if owner is None:
        raise KVPlanError(
            f"layer {layer} reads the {half} of layer {source}, which has none: "
            "name a layer that keeps them, or drop the reader too"
        )
    if owner != source:
        raise KVPlanError(
            f"layer {layer} reads the {half} of layer {source}, which reads those of layer "
            f"{owner}: name {owner} instead"
        )


def _check_halves(plan: KVPlan) -> None:
    """Refuse keys and values of two layers unless both hold all tokens, so the same ones."""
    for layer, pair in enumerate(zip(plan.key_sources, plan.value_sources, strict=True)):
        for source in pair:
            if pair[0] != pair[1] and source is not None and plan.actions[source].bounded:
                raise KVPlanError(
                    f"layer {layer} reads keys and values of two layers, but layer {source} does "
                    "not hold all tokens: name one layer for both, or let it keep all"
                )


def _resolved(layer: int, actions: Sequence[Action]) -> Action:
    """The action of ``layer`` with each source replaced by the layer that the source reads."""
    action = actions[layer]
    key, value = action.keys_from(layer), action.values_from(layer)
    if key is None or value is None or not (0 <= key <= layer and 0 <= value <= layer):
        return action
    new = actions[key].keys_from(key), actions[value].values_from(value)
    if new == (key, value) or None in new:
        return action
    found = read_action(f"{new[0]}k{new[1]}v", layer)
    assert found is not None
    return found
