"""Run a command with the parts that it names in its signature.

`main` calls `run_command`. A command with ``def run(log, loaded, windows)`` is given a `RunLog`, a
`LoadedModel` and `Windows`. A part is made once, when a command or another part first asks for it.
The constructor of a part names the parts that it needs in the same way. Making a part loads no
model: the model is loaded when somebody first reads it.
"""

from __future__ import annotations

from contextlib import ExitStack
from importlib import import_module
from inspect import signature
from typing import Any

from kvsharer_exp.cli.config.schema import Config

PARTS = {
    "log": ("run_log", "RunLog"),
    "loaded": ("loaded_model", "LoadedModel"),
    "windows": ("windows", "Windows"),
    "calibration": ("calibration", "Calibration"),
    "scorers": ("scorers", "Scorers"),
    "plans": ("plans", "Plans"),
}
"""For each parameter, a module of this folder and the class in it. It is imported when needed."""


def run_command(config: Config) -> int:
    """Run the command that ``config`` names; returns its exit code.

    If the command has a run log, its run ends as the command does: finished, failed or killed.
    """
    run = import_module(f"kvsharer_exp.cli.commands.{config.command}").run
    made: dict[str, Any] = {"config": config}
    with ExitStack() as stack:

        def part(name: str) -> Any:
            if name not in made:
                module, kind = PARTS[name]
                create = getattr(import_module(f"kvsharer_exp.cli.session.{module}"), kind)
                made[name] = create(**{need: part(need) for need in signature(create).parameters})
                if name == "log":
                    stack.enter_context(made[name])
            return made[name]

        return run(**{name: part(name) for name in signature(run).parameters}) or 0
