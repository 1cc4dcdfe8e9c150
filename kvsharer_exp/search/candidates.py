"""The actions that a search may give each layer, with what is known of each beforehand.

The command ``sweep`` makes the `Candidate` list. The search space ``layer_actions`` holds it, and
the loss model and the solver work on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.actions.registry import read_action
from kvsharer_exp.values.errors import InputError

OWN, READ = "own", "read"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One action at one layer: its block error, and the bytes it keeps at the search's context.

    The error of a layer that keeps its KV in 16 bits is 0.
    """

    layer: int
    action: Action
    error: float
    kv_bytes: int


def wanted_actions(layer: int, texts: Sequence[str], fixed: Mapping[int, str]) -> list[Action]:
    """The actions that ``texts`` name at ``layer``; ``read`` names no source and is left out.

    A text is that of a plan without the layer: ``own``, ``q4s4``, ``x``, ``c``, ``a``. A layer in
    ``fixed`` has the one action that is named there.

    Raises:
        InputError: a text means no action.
    """
    found = []
    for text in [fixed[layer]] if layer in fixed else texts:
        if text == READ:
            continue
        action: Action | None = Own() if text == OWN else None
        action = action or read_action(str(text), layer) or read_action(f"{layer}{text}", layer)
        if action is None or action.keys_from(layer) not in (None, layer):
            raise InputError(
                f"search_space.options: {text} is no action of layer {layer}: "
                "give own, q4, q3s4, x, c, a or read"
            )
        found.append(action)
    return list(dict.fromkeys(found))
