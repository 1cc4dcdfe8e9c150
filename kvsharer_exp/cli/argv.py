"""List the commands, and translate our command line into Hydra's.

`main` calls `translate`. Hydra knows overrides only; the bare command word is ours. So ``sweep``
becomes ``command=sweep``. ``model=x`` and ``experiment=x`` become ``+model=x`` and
``+experiment=x``, because Hydra composes a group without a default only with a plus. Text is
written as Hydra reads it (`as_typed`). The default model is added. Unknown words are refused before
anything is loaded.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from kvsharer_exp.cli.config.groups import groups
from kvsharer_exp.cli.config.model import DEFAULT_MODEL
from kvsharer_exp.cli.config.passwords import refuse_typed_password
from kvsharer_exp.cli.config.text_keys import expand_home
from kvsharer_exp.cli.quoting import as_typed, names_only, pieces, value_of
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import shorten

COMMANDS = {
    "calibrate": "layer statistics -> distance matrix, ranking, heat map",
    "search": "the paper's greedy strategy at each compression ratio -> maps, acceptance trace",
    "sweep": "the Optuna search -> Pareto front of memory against accuracy, in MLflow",
    "evaluate": "scores of one map or plan (map=0_1_0_3, plan=0_1q4_0_a, a .json file or an MLflow "
    "run id) beside the full cache; engine=vllm: beside its scores in vLLM",
    "plan": "what a plan does (plan=0_1q4_0_a), layer by layer; or the best plan for a budget "
    "(compression.kv=[0.25] run=ID) of a finished sweep of plans, without a model",
    "bench": "memory and speed of one map or plan beside the full cache; without one what a ratio "
    "would buy; engine=vllm: requests that fit and throughput in vLLM",
    "ablate": "the paper's ablations and its reviewers' questions (+experiment=NAME), with "
    "intervals",
    "report": "finished runs (run=ID,ID; without: the newest) beside the paper: tables, figures, "
    "one page",
    "reproduce": "a recorded run again (run=ID), value by value",
    "export": "one map as a model folder: fewer weights, loads with and without this package",
    "generate": "answers to a prompt, full and shared side by side",
    "serve": "an export (serve.folder=FOLDER) in vLLM; --check compares its answers and KV blocks",
    "ui": "the MLflow UI on this store",
    "status": "how the studies of this store stand (study=NAME: one of them): workers, plans a "
    "minute, failures, the best so far",
    "doctor": "what works on this machine: device, memory, hub, models, tasks",
}
"""Every command, and what ``--help`` says of it. Each command is a file of ``commands/``."""

_COMPLETION = "a script for your shell (bash, zsh or fish) that completes words with TAB"
_FOLDER_FLAGS = ("--config-dir", "-cd")
_FLAGS_WITH_VALUE = (
    *("--cfg", "-c", "--info", "-i", "--package", "-p", *_FOLDER_FLAGS),
    *("--config-name", "-cn", "--config-path", "-cp", "--experimental-rerun"),
)
_FLAGS_WITHOUT_COMMAND = ("--help", "-h", "--hydra-help", "--shell-completion", "-sc")
_SWITCHES = {"--quiet": "quiet=true", "-q": "quiet=true", "--check": "serve.check=true"}
_FLAGS = (
    *(*_SWITCHES, "--multirun", "-m", "--run", "-r", "--resolve"),
    *(*_FLAGS_WITH_VALUE, *_FLAGS_WITHOUT_COMMAND),
)
_CFG = ("job", "hydra", "all")
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_FLAG_VALUES = {"--cfg": _CFG, "-c": _CFG, "--info": _INFO, "-i": _INFO}
_LINE_CHARACTERS = 190  # the most characters of an error that holds a command
_LIST_CHARACTERS = 90  # the most characters of the choices that an error lists
_ADDED = ("model", "experiment")  # the groups without a default
_ENDLESS = re.compile(r"(?:\d_?){4000}")  # Python reads no number as long as this
_PLACE_KEYS = {"model": "model.source", "calibration": "calibration.path"}  # these take a place
_FILES = (".yaml", ".yml", ".txt", ".jsonl", ".json", ".gguf")


def help_lines() -> str:
    """The commands as ``--help`` lists them, one a line."""
    listed = {**COMMANDS, "completion": _COMPLETION}
    return "\n".join(f"  {name:12}{text}" for name, text in listed.items())


def translate(arguments: Sequence[str]) -> list[str]:
    """Translate our command line into Hydra's: flags first, then overrides.

    Raises:
        InputError: there is no command, or there are two; a command, flag, model or experiment is
            unknown; a file is given where a name belongs; there are two models; a flag lacks its
            value, or a value its key; a flag is for another command; an argument is no text; or it
            holds a password.
    """
    flags: list[str] = []
    overrides: list[str] = []
    words: list[str] = []
    expects_value = False
    arguments = [_utf8(argument) for argument in arguments]
    for argument in arguments:
        refuse_typed_password(argument)
        if _ENDLESS.search(argument):
            key = shorten(argument.partition("=")[0], 40)
            raise InputError(f"{key} is given a number of thousands of digits: give a smaller one")
    for argument in arguments:
        if argument in _SWITCHES:
            overrides.append(_SWITCHES[argument])
        elif expects_value or argument.startswith("-"):
            if expects_value:
                if argument.startswith("-") and argument != "-":
                    raise InputError(f"{flags[-1]} needs a value: see --help")
                _check_value(flags[-1], argument)
            else:
                _check_flag(argument)
            flags.append(_expanded(argument, flags))
            expects_value = not expects_value and argument in _FLAGS_WITH_VALUE
        elif argument.startswith("command="):
            words.append(argument.removeprefix("command="))
        elif "=" in argument or argument.startswith("~"):
            overrides.append(argument)
        else:
            words.append(argument)
    if expects_value:
        raise InputError(f"{flags[-1]} needs a value: see --help")
    if len(words) > 1:
        raise InputError(f"two commands given ({', '.join(words)}): give one, keys as key=value")
    if "--check" in arguments and words != ["serve"]:
        raise InputError("--check is for serve: leave it out, or give kvsharer serve")
    if words:
        overrides.insert(0, f"command={known('command', words[0], COMMANDS)}")
    elif not any(flag in _FLAGS_WITHOUT_COMMAND for flag in flags):
        raise InputError(f"no command given: choose one of {', '.join(COMMANDS)}, or --help")
    if words == ["status"]:  # which has one key of the group
        overrides = [re.sub("^study=", "study.name=", override) for override in overrides]
    sweep = bool({"-m", "--multirun"}.intersection(flags)) or "hydra.mode=MULTIRUN" in overrides
    overrides = [as_typed(override, sweep=sweep) for override in overrides]
    choices = groups(user_folders([*flags, *overrides])[0])
    overrides = [_group(override, choices) for override in overrides]
    models = [o.removeprefix("+model=") for o in overrides if o.startswith("+model=")]
    if len(models) > 1:
        raise InputError(f"two models given ({', '.join(models)}): give one, or a,b with -m")
    if not models:
        overrides.append(f"+model={DEFAULT_MODEL}")
    return [*flags, *overrides]


def _check_flag(argument: str) -> None:
    """Refuse a flag, or ``flag=value``, that Hydra's own parser would end the process for."""
    name, equals, value = argument.partition("=")
    known("flag", name, _FLAGS)
    if equals and name not in _FLAGS_WITH_VALUE:
        raise InputError(f"{name} takes no value: leave out {shorten(argument, 40)!r}")
    if equals:
        _check_value(name, value)


def _check_value(flag: str, value: str) -> None:
    if flag in _FLAG_VALUES:
        known(flag, value, _FLAG_VALUES[flag])


def _utf8(argument: str) -> str:
    """Read an argument as UTF-8, also where Python took it for ASCII because the locale is C."""
    try:
        return argument.encode(errors="surrogateescape").decode()
    except UnicodeError as error:
        key = ascii(argument.partition("=")[0])
        raise InputError(f"{key} is given what is not UTF-8 text: give it as UTF-8") from error


def user_folders(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The folders with groups of the user's that ``words`` name for Hydra, and the other words."""
    folders: list[str] = []
    others: list[str] = []
    flags = iter(words)
    for word in flags:
        name, _, value = word.partition("=")
        if name in _FOLDER_FLAGS:
            folders.append(expand_home(value or next(flags, "")))
        elif name == "hydra.searchpath":
            entries = value_of(as_typed(word, sweep=False))
            folders += map(str, entries) if isinstance(entries, list) else []
        else:
            others.append(word)
    return folders, others


def _expanded(flag: str, before: Sequence[str]) -> str:
    """Expand the ``~`` of ``--config-dir=~/conf``, which shells leave as it is."""
    name, equals, value = flag.partition("=")
    if before and before[-1] in _FOLDER_FLAGS:
        return expand_home(flag)
    return f"{name}={expand_home(value)}" if equals and name in _FOLDER_FLAGS else flag


def _group(override: str, choices: Mapping[str, Sequence[str]]) -> str:
    """Look up the choice of a group, and write the plus of a group without a default."""
    key, _, value = override.partition("=")
    group = key.lstrip("+")
    named = group.lstrip("~").partition("@")[0]
    if not named:
        raise InputError(f"{shorten(override, 60)!r} has no key: give key=value")
    is_group = named in choices or named.partition("/")[0] == "hydra"
    if is_group and not names_only(override):
        raise InputError(unknown(named, value, choices.get(named, ())))
    if group not in choices:
        return override
    for name in pieces(value):  # there may be several with -m
        if name not in choices[group] and _is_place(name, choices[group]):
            raise InputError(_as_choice(group, name, choices[group]))
        if group in _ADDED:
            known(group, name, choices[group])
    return f"+{group}={value}" if group in _ADDED else override


def _is_place(name: str, choices: Sequence[str]) -> bool:
    """Whether ``name`` is a file, a folder or an address, and not a choice with a typing error."""
    path = Path(name)
    return "/" in name or name[:1] == "~" or (path.suffix in _FILES and path.stem not in choices)


def _as_choice(group: str, name: str, choices: Sequence[str]) -> str:
    """Say how to give what is at the place ``name``: as a choice, or with another key."""
    path, said = Path(name), f"{group}={shorten(name)} is no choice of the group {group}"
    if path.suffix not in _FILES[:2] and group in _PLACE_KEYS:
        ways = [f"give {_PLACE_KEYS[group]}={place}" for place in (name, "PLACE")]
    else:
        choice = f"my_{path.stem}" if path.stem in choices else path.stem
        ways = [
            f"put it at DIR/{group}/{called}.yaml, give --config-dir DIR {group}={called}"
            for called in (choice, "NAME")
        ]
        if path.parent.name == group and choice == path.stem:
            folder = re.sub(r"([^\w~./@%+:,-])", r"\\\1", str(path.parent.parent))  # for a shell
            ways.insert(0, f"give --config-dir {folder} {group}={choice}")
    # A way is there to be copied. So nothing in it is shortened; what is too long gets a stand-in.
    room = _LINE_CHARACTERS - len(f"{said}: ")
    return f"{said}: {next((way for way in ways if len(way) <= room), ways[-1])}"


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
