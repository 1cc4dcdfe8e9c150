"""Copy the modules of another package's actions, as `plan_code` copies those of our own.

An action of another package is a value class and a runner (`kvsharer_exp.extend`). Both modules go
into an export, and the modules of the same package that they import. Their imports are rewritten to
the files of the export: a name of `kvsharer_exp.extend` is taken from the module that it is defined
in. Every other package that they import has to be installed where the export is loaded.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Collection
from importlib import import_module

from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import clip

_OURS = "kvsharer_exp"
_EXTEND = f"{_OURS}.extend"


class ForeignCode:
    """The files of the actions ``classes``, of other packages.

    ``flat`` names the file of one of our own modules, without its ending. ``files`` are by name,
    and ``needed`` are the modules of our own that they import.

    Raises:
        InputError: a module has no source, or imports its own package or ours in another way than
            by ``from … import …``.
    """

    def __init__(self, classes: Collection[type[Action]], flat: Callable[[str], str]) -> None:
        self._flat_own = flat
        self.needed: set[str] = set()
        self.files: dict[str, str] = {}
        self._classes = list(classes)
        waiting = [module for action in classes for module in _modules_of(action)]
        while waiting:
            module = waiting.pop()
            if f"{self._flat(module)}.py" not in self.files:
                waiting += self._copy(module)

    def registered(self) -> str:
        """Lines for the end of the file of the actions' registry."""
        lines = [
            f"from .{self._flat(action.__module__)} import {action.__name__} as _Other{number}\n"
            for number, action in enumerate(self._classes)
        ]
        names = "".join(f", _Other{number}" for number in range(len(lines)))
        return "".join(lines) + f"OURS = (*OURS{names})\n" if lines else ""

    def imported(self) -> str:
        """Lines for the end of the main file: transformers copies modules that are imported."""
        return "".join(
            f"from .{self._flat(module)} import {name} as _OtherRunner{number}\n"
            for number, (module, _, name) in enumerate(
                action.runner.partition(":") for action in self._classes
            )
        )

    def _copy(self, module: str) -> set[str]:
        """Make the file of ``module``; returns the modules of its package that it needs."""
        text = _source(module)
        lines = text.splitlines(keepends=True)
        beside: set[str] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                whole = [alias.name for alias in node.names if self._is_copied(alias.name, module)]
                if whole:
                    raise InputError(
                        f"module {module} imports {clip(whole[0], 60)} as a whole, so an export "
                        "cannot hold it: let it use from … import …"
                    )
            if not isinstance(node, ast.ImportFrom):
                continue
            origin = _absolute(node, module)
            if not self._is_copied(origin, module):
                continue
            new = ""
            for alias in node.names:
                home = _home(origin, alias.name)
                (self.needed if home.partition(".")[0] == _OURS else beside).add(home)
                name = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
                new += f"{' ' * node.col_offset}from .{self._flat(home)} import {name}\n"
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            lines[first:last] = [new, *[""] * (last - first - 1)]
        text = "".join(lines)
        for action in self._classes:
            if action.__module__ == module:
                text = self._with_runner(text, action)
        about = f"# A module of {module.partition('.')[0]}, copied with an action of a KV plan.\n"
        self.files[f"{self._flat(module)}.py"] = about + text
        return beside

    def _with_runner(self, text: str, action: type[Action]) -> str:
        module, _, name = action.runner.partition(":")
        for quote in "\"'":
            text = text.replace(
                f"{quote}{action.runner}{quote}", f"{quote}.{self._flat(module)}:{name}{quote}"
            )
        if action.runner in text or f".{self._flat(module)}:{name}" not in text:
            raise InputError(
                f"module {action.__module__} does not name the runner of {action.name} in one "
                "piece, so an export cannot hold it: write it as one text"
            )
        return text

    def _flat(self, module: str) -> str:
        if module.partition(".")[0] == _OURS:
            return self._flat_own(module)
        return f"kvplan_of_{module.replace('.', '_')}"

    def _is_copied(self, name: str, module: str) -> bool:
        return name.partition(".")[0] in (_OURS, module.partition(".")[0])


def _modules_of(action: type[Action]) -> tuple[str, str]:
    return action.__module__, action.runner.partition(":")[0]


def _source(module: str) -> str:
    try:
        return inspect.getsource(import_module(module))
    except (OSError, TypeError) as error:
        raise InputError(
            f"module {module} has no source, so an export cannot hold it: install its package "
            "with its sources"
        ) from error


def _absolute(node: ast.ImportFrom, module: str) -> str:
    """The module that ``node`` in ``module`` imports from."""
    if not node.level:
        return str(node.module)
    above = module.split(".")[: -node.level]
    return ".".join([*above, *([node.module] if node.module else [])])


def _home(origin: str, name: str) -> str:
    """The module that defines ``name``, which is imported from ``origin``."""
    return str(getattr(import_module(origin), name).__module__) if origin == _EXTEND else origin
