"""Finds the class that runs an action, which the action itself names."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from kvsharer_exp.model.actions.base import ActionRunner
from kvsharer_exp.values.actions.base import Action


@cache
def runner_of(action: Action) -> ActionRunner:
    """The runner of ``action``, a value that is the same for equal actions."""
    module, _, name = action.runner.partition(":")
    # In an export the modules lie in one folder, and the name is relative to it.
    runner = getattr(import_module(module, __package__), name)
    return runner(action)
