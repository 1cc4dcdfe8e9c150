"""The actions that a search may give each layer, with what is known of each beforehand.

The command ``sweep`` makes the `Candidate` list. The search space ``layer_actions`` holds it, and
the loss model and the solver work on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvsharer_exp.search.solver import solve_with_reads
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.actions.registry import read_action
from kvsharer_exp.values.choice import Choice, ReadChoice
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import clip, read_integer

OWN, READ, HALVES = "own", "read", "halves"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One action at one layer: its block error, and the bytes it keeps at the search's context.

    The error of a layer that keeps its KV in 16 bits is 0. ``full_bytes`` are what the layer then
    keeps, whether or not that is a candidate.
    """

    layer: int
    action: Action
    error: float
    kv_bytes: int
    full_bytes: int


def full_bytes(candidates: Iterable[Candidate]) -> int:
    """The bytes of the full cache."""
    return sum({c.layer: c.full_bytes for c in candidates}.values())


def priced(
    candidates: Sequence[Candidate], costs: Mapping[tuple[int, Action], float]
) -> tuple[list[Choice], list[ReadChoice]]:
    """What each layer may do, at these ``costs``; a read costs as `plan_terms` has it.

    A layer that reads a quantised owner also loses what it would lose by these bits itself. The
    integer program knows reads of one source: keys of one layer and values of another are left out.
    """
    owns: dict[int, list[Action]] = {c.layer: [] for c in candidates}
    for c in candidates:
        if c.action.keys_from(c.layer) == c.layer:
            owns[c.layer].append(c.action)
    choices, reads = [], []
    for candidate in candidates:
        layer, action = candidate.layer, candidate.action
        loss, source = costs[layer, action], action.keys_from(layer)
        if source is None or source == layer:
            choices.append(Choice(layer, action, loss, candidate.kv_bytes))
        elif action.values_from(layer) == source:
            losses = {own: loss + costs.get((layer, own), 0.0) for own in owns[source]}
            reads.append(ReadChoice(layer, source, losses))
    return choices, reads


def smallest(candidates: Sequence[Candidate]) -> int:
    """The bytes of the smallest plan of ``candidates``."""
    costs = {(c.layer, c.action): float(c.kv_bytes) for c in candidates}
    choices, reads = priced(candidates, costs)
    reads = [replace(read, losses=dict.fromkeys(read.losses, 0.0)) for read in reads]
    solved, _ = solve_with_reads(choices, reads, full_bytes(candidates))
    return solved.kv_bytes


def fixed_layers(given: Any) -> dict[int, str]:
    """The option ``fixed`` of a search of plans: by layer the text of the one action that it does.

    Raises:
        InputError: it is no mapping from the numbers of layers.
    """
    try:
        return {read_integer(str(layer)): str(text) for layer, text in (given or {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"search_space.options.fixed={clip(str(given), 40)}: give layers and what they do, "
            "like {0: own, 3: x}"
        ) from error


def wanted_actions(layer: int, texts: Sequence[str], fixed: Mapping[int, str]) -> list[Action]:
    """The actions that ``texts`` name at ``layer``.

    A text is that of a plan without the layer: ``own``, ``q4s4``, ``x``, ``c``, ``a``. A layer in
    ``fixed`` has the one action that is named there. ``read`` and ``halves`` name no source, and
    are left out.

    Raises:
        InputError: a text means no action.
    """
    found = []
    for text in [fixed[layer]] if layer in fixed else texts:
        if text in (READ, HALVES):
            continue
        action: Action | None = Own() if text == OWN else None
        action = action or read_action(str(text), layer) or read_action(f"{layer}{text}", layer)
        if action is None or _other_layers(layer, action):
            raise InputError(
                f"search_space.options: {text} is no action of layer {layer}: "
                "give own, q4, q3s4, x, c, a, read or halves"
            )
        found.append(action)
    return list(dict.fromkeys(found))


def _other_layers(layer: int, action: Action) -> set[int | None]:
    """The layers whose keys or values are read at ``layer``."""
    return {action.keys_from(layer), action.values_from(layer)} - {None, layer}
