"""Copy the modules of another package's actions, as `plan_code` copies those of our own.

An action of another package is a value class and a runner (`kvsharer_exp.extend`). Both modules go
into an export, and the modules of the same package that they import. Their imports are rewritten to
the files of the export: a name of `kvsharer_exp.extend` is taken from the module that it is defined
in. Every other package that they import has to be installed where the export is loaded.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Collection, Iterable
from importlib import import_module
from importlib.util import find_spec
from itertools import takewhile
from typing import Any

from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.registry import OURS
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import clip

_PACKAGE = "kvsharer_exp"
_EXTEND = f"{_PACKAGE}.extend"


class ForeignCode:
    """The files of the actions ``classes``, of other packages.

    ``flat`` names the file of one of our own modules, without its ending. ``files`` are by name,
    and ``needed`` are the modules of our own that they import.

    Raises:
        InputError: a module has no source, or imports its own package or ours in another way than
            by ``from … import …``, or an action does not name its runner in its own module.
    """

    def __init__(self, classes: Collection[type[Action]], flat: Callable[[str], str]) -> None:
        self._classes, self._flat_own = list(classes), flat
        self.files: dict[str, str] = {}
        self.needed: set[str] = set()
        waiting = [module for kind in classes for module in (kind.__module__, _runner(kind)[0])]
        while waiting:
            module = waiting.pop()
            if _is_ours(module):
                self.needed.add(module)
            elif f"{self.flat(module)}.py" not in self.files:
                waiting += self._copy(module)

    def registered(self) -> str:
        """Lines for the end of the file of the actions' registry."""
        names = [(kind.__module__, kind.__name__) for kind in self._classes]
        more = "".join(f", _Other{number}" for number in range(len(names)))
        return self._imports(names, "_Other") + (f"OURS = (*OURS{more})\n" if more else "")

    def imported(self) -> str:
        """Lines for the end of the main file: the runners of our actions and of these.

        A plan finds them by name, and transformers copies modules that are imported.
        """
        return self._imports(map(_runner, (*OURS, *self._classes)), "_Runner")

    def flat(self, module: str) -> str:
        """The name that ``module`` has in the folder of an export."""
        return (
            self._flat_own(module) if _is_ours(module) else f"kvplan_of_{module.replace('.', '_')}"
        )

    def _imports(self, names: Iterable[tuple[str, str]], prefix: str) -> str:
        return "".join(
            f"from .{self.flat(module)} import {name} as {prefix}{number}\n"
            for number, (module, name) in enumerate(names)
        )

    def _copy(self, module: str) -> set[str]:
        """Make the file of ``module``; returns the modules of its package that it needs."""
        try:
            text = inspect.getsource(import_module(module))
        except (ImportError, OSError, TypeError) as error:
            raise InputError(
                f"module {module} has no source, so an export cannot hold it: install its package "
                "with its sources"
            ) from error
        here = [kind for kind in self._classes if kind.__module__ == module]
        named = {kind.runner: kind for kind in here if "runner" in vars(kind)}
        rewriter = _Rewriter(module, named, self.flat)
        tree = rewriter.visit(ast.parse(text))
        for runner, kind in rewriter.runners.items():
            raise InputError(
                f"module {module} does not name {clip(runner, 60)}, the runner of {kind.name}, so "
                "an export cannot hold it: write it there as one text"
            )
        head = "".join(takewhile(lambda line: line[:1] == "#", text.splitlines(keepends=True)))
        self.files[f"{self.flat(module)}.py"] = f"{head}{ast.unparse(tree)}\n"
        return rewriter.found


class _Rewriter(ast.NodeTransformer):
    """Rewrites the imports of ``module`` and the ``runners`` that it names.

    What it found goes into ``found``, and out of ``runners``.
    """

    def __init__(
        self, module: str, runners: dict[str, type[Action]], flat: Callable[[str], str]
    ) -> None:
        self.module, self.runners, self.flat = module, runners, flat
        self.named = set(runners)
        self.found: set[str] = set()

    def visit_Import(self, node: ast.Import) -> ast.AST:
        for alias in node.names:
            if self._is_copied(alias.name):
                raise self._refusal(alias.name)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        origin = node.module or ""
        if node.level:
            package = str(import_module(self.module).__package__).split(".")
            above = package[: len(package) - node.level + 1]
            origin = ".".join([*above, *([node.module] if node.module else [])])
        if not self._is_copied(origin):
            return node
        new = []
        for alias in node.names:
            if alias.name == "*" or _is_module(f"{origin}.{alias.name}"):
                raise self._refusal(f"{origin}.{alias.name}")
            home = origin
            if origin == _EXTEND:
                home = str(getattr(import_module(origin), alias.name).__module__)
            self.found.add(home)
            new.append(ast.ImportFrom(self.flat(home), [alias], 1))
        return new

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if node.value not in self.named:
            return node
        self.runners.pop(node.value, None)
        module, _, name = node.value.partition(":")
        return ast.Constant(f".{self.flat(module)}:{name}")

    def _is_copied(self, name: str) -> bool:
        return _is_ours(name) or name.partition(".")[0] == self.module.partition(".")[0]

    def _refusal(self, name: str) -> InputError:
        return InputError(
            f"module {self.module} imports {clip(name, 60)} as a whole, so an export cannot hold "
            "it: let it name what it needs by from … import …"
        )


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == _PACKAGE


def _runner(kind: type[Action]) -> tuple[str, str]:
    module, _, name = kind.runner.partition(":")
    return module, name


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # what is before the last dot is no package
        return False
