"""The actions that a plan can be made of: ours, and those that other packages bring.

A new action is a value class like those beside this file, the class that runs it in
``model/actions/``, and its line in `OURS`. Another package adds one by an entry point of the group
``kvsharer_exp.actions`` that loads the value class. `plan.KVPlan` reads texts with `read_action`.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from kvsharer_exp.values.actions.affine import Affine
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.constant import Constant
from kvsharer_exp.values.actions.drop import Drop
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.actions.read import Read
from kvsharer_exp.values.actions.read_kv import ReadKV
from kvsharer_exp.values.errors import InputError, did_you_mean
from kvsharer_exp.values.plugins import find_part
from kvsharer_exp.values.text import clip

# An export has a copy of this file in another package, and finds no actions of others there.
GROUP = f"{__name__.partition('.')[0]}.actions"
OURS: tuple[type[Action], ...] = (Own, Read, ReadKV, Drop, Constant, Affine)


@cache
def action_classes() -> dict[str, type[Action]]:
    """Every action by name, ours first.

    Raises:
        InputError: another package's action cannot be loaded.
    """
    ours: dict[str, type[Action]] = {action.name: action for action in OURS}
    others = sorted({entry.name for entry in entry_points(group=GROUP)} - set(ours))
    key = "search_space.options.actions"
    return ours | {name: find_part(name, ours, group=GROUP, key=key) for name in others}


def read_action(text: str, layer: int) -> Action | None:
    """The action that ``text`` means at ``layer``, in its simplest form; None if it is no text.

    Raises:
        InputError: a part of it breaks a rule, as a number of bits that is not known.
    """
    for action_class in action_classes().values():
        try:
            action = action_class.read(text, layer)
        except InputError:
            raise
        except ValueError as error:  # Python reads no number of more than 4300 digits
            raise InputError(
                "it holds a number that is too long: give the number of a layer"
            ) from error
        if action is not None:
            return action.canonical(layer)
    return None


def action_from_dict(data: dict[str, Any]) -> Action:
    """What `Action.to_dict` gave.

    Raises:
        InputError: there is no action of this name, or it does not take these fields.
    """
    fields = dict(data)
    if "action" not in fields:
        raise InputError('it names no action: give one, like {"action": "drop"}')
    name = str(fields.pop("action"))
    classes = action_classes()
    if name not in classes:
        raise InputError(
            f"action {clip(name, 30)!r} is unknown: {did_you_mean(name, list(classes))}"
        )
    try:
        return classes[name](**fields)
    except TypeError as error:
        raise InputError(
            f"action {name} does not take {clip(', '.join(fields), 60)}: give what its text gives"
        ) from error
