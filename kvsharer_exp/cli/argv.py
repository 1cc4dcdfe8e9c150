"""List the commands, and translate our command line into Hydra's.

`main` calls `translate`. Hydra knows overrides only; the bare command word is ours. So ``sweep``
becomes ``command=sweep``. ``model=x`` and ``experiment=x`` become ``+model=x`` and
``+experiment=x``, because Hydra composes a group without a default only with a plus. The default
model is added. Unknown words are refused before anything is loaded.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

from kvsharer_exp.cli.config.model import DEFAULT_MODEL
from kvsharer_exp.model.folders import data_dir
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import shorten

COMMANDS = {
    "calibrate": "layer statistics -> distance matrix, ranking, heat map",
    "search": "the paper's greedy strategy at each compression ratio -> maps, acceptance trace",
    "sweep": "the Optuna search -> Pareto front of memory against accuracy, in MLflow",
    "evaluate": "scores of one map (map=0_1_0_3, a .json file or an MLflow run id) beside the full "
    "cache",
    "bench": "memory and speed of one map beside the full cache; without map= what a ratio would "
    "buy",
    "ablate": "the paper's ablations and its reviewers' questions (+experiment=NAME), with "
    "intervals",
    "report": "finished runs (run=ID,ID; without: the newest) beside the paper: tables, figures, "
    "one page",
    "reproduce": "a recorded run again (run=ID), value by value",
    "export": "one map as a model folder: fewer weights, loads with and without this package",
    "generate": "answers to a prompt, full and shared side by side",
    "ui": "the MLflow UI on this store",
    "doctor": "what works on this machine: device, memory, hub, models, tasks",
}
"""Every command, and what ``--help`` says of it. Each command is a file of ``commands/``."""

_COMPLETION = "a script for your shell (bash, zsh or fish) that completes words with TAB"
_FLAGS_WITH_VALUE = (
    *("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-dir", "-cd"),
    *("--config-name", "-cn", "--config-path", "-cp", "--experimental-rerun"),
)
_FLAGS_WITHOUT_COMMAND = ("--help", "-h", "--hydra-help", "--shell-completion", "-sc")
_FLAGS = (
    *("--quiet", "-q", "--multirun", "-m", "--run", "-r", "--resolve"),
    *(*_FLAGS_WITH_VALUE, *_FLAGS_WITHOUT_COMMAND),
)
_FLAG_VALUES = {"--cfg": ("job", "hydra", "all"), "-c": ("job", "hydra", "all")}
_LIST_CHARACTERS = 90  # the most characters of the choices that an error lists


def help_lines() -> str:
    """The commands as ``--help`` lists them, one a line."""
    listed = {**COMMANDS, "completion": _COMPLETION}
    return "\n".join(f"  {name:12}{text}" for name, text in listed.items())


def translate(arguments: Sequence[str]) -> list[str]:
    """Translate our command line into Hydra's: flags first, then overrides.

    Raises:
        InputError: there is no command, or there are two; a command, flag, model or experiment is
            unknown; there are two models; or a flag lacks its value, or a value its key.
    """
    flags: list[str] = []
    overrides: list[str] = []
    words: list[str] = []
    expects_value = False
    for argument in arguments:
        if argument in ("--quiet", "-q"):
            overrides.append("quiet=true")
        elif expects_value or argument.startswith("-"):
            if not expects_value:
                known("flag", argument.partition("=")[0], _FLAGS)
            elif flags[-1] in _FLAG_VALUES:
                known(flags[-1], argument, _FLAG_VALUES[flags[-1]])
            flags.append(argument)
            expects_value = not expects_value and argument in _FLAGS_WITH_VALUE
        elif argument.startswith("command="):
            words.append(argument.removeprefix("command="))
        elif argument.startswith("="):
            raise InputError(f"{argument!r} has no key: give key=value")
        elif "=" in argument or argument.startswith("~"):
            overrides.append(argument)
        else:
            words.append(argument)
    if expects_value:
        raise InputError(f"{flags[-1]} needs a value: see --help")
    if len(words) > 1:
        raise InputError(f"two commands given ({', '.join(words)}): give one, keys as key=value")
    if words:
        overrides.insert(0, f"command={known('command', words[0], COMMANDS)}")
    elif not any(flag in _FLAGS_WITHOUT_COMMAND for flag in flags):
        raise InputError(f"no command given: choose one of {', '.join(COMMANDS)}, or --help")
    if not {"-m", "--multirun"}.intersection(flags):
        overrides = [_run_list(override) for override in overrides]
    overrides = [_added_group(_ids_as_text(override)) for override in overrides]
    models = [o.removeprefix("+model=") for o in overrides if o.startswith("+model=")]
    if len(models) > 1:
        raise InputError(f"two models given ({', '.join(models)}): give one, or a,b with -m")
    if not models:
        overrides.append(f"+model={DEFAULT_MODEL}")
    return [*flags, *overrides]


def _run_list(override: str) -> str:
    """Write ``run=a,b`` with the brackets that Hydra wants around a list."""
    key, _, value = override.partition("=")
    several = key == "run" and "," in value and value[0] not in "['\""
    return f"run=[{value}]" if several else override


def _ids_as_text(override: str) -> str:
    """Write ``run=1148e184`` as ``run='1148e184'``: Hydra takes such an MLflow id for a number."""
    if override.partition("=")[0] not in ("run", "map"):
        return override
    return re.sub(r"(?<=[=,\[])(\d+e\d+)(?=[,\]]|$)", r"'\1'", override)


def _added_group(override: str) -> str:
    key, _, value = override.partition("=")
    group = key.lstrip("+")
    if group not in ("model", "experiment"):
        return override
    choices = sorted(path.stem for path in data_dir("conf").glob(f"{group}/*.yaml"))
    for name in value.split(","):  # there may be several with -m
        known(group, name, choices)
    return f"+{group}={value}"


def known(what: str, value: str, choices: Collection[str]) -> str:
    """Return ``value``, a ``what`` such as ``"model"``, if it is one of ``choices``.

    Raises:
        InputError: it is not.
    """
    if value not in choices:
        raise InputError(unknown(what, value, choices))
    return value


def unknown(what: str, value: str, choices: Collection[str]) -> str:
    """Say that ``value`` is none of ``choices``; name the one most like it, or list them."""
    near = difflib.get_close_matches(value, choices, n=1)
    listed = ", ".join(choices)
    if len(listed) > _LIST_CHARACTERS:
        listed = listed[:_LIST_CHARACTERS].rpartition(",")[0] + ", … (--help lists all)"
    others = f"choose one of {listed}" if listed else "see --help"
    hint = f"did you mean {near[0]}?" if near else others
    return f"{what} {shorten(value, 40)!r} is unknown: {hint}"
