"""The command line: ``kvsharer COMMAND key=value …``, in any order, on top of Hydra.

Hydra knows overrides only; the bare word is ours. `translate` turns ``sweep`` into
``command=sweep``, ``model=x`` and ``experiment=x`` into ``+model=x`` and ``+experiment=x`` (a group
without a default composes only so), adds the default model, and refuses unknown words before
anything is loaded.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvsharer_exp import __version__, completion
from kvsharer_exp.assets import data_dir, shorten
from kvsharer_exp.config import DEFAULT_MODEL, explain, register, to_config
from kvsharer_exp.errors import InputError
from kvsharer_exp.machine import settle
from kvsharer_exp.terminal import one_line, settle_streams

COMMANDS = (
    *("calibrate", "search", "sweep", "evaluate", "bench", "ablate"),
    *("report", "reproduce", "export", "generate", "ui", "doctor"),
)
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
_LIST_CHARACTERS = 90  # of the choices an error lists


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code (0 done, 1 failed, 2 bad input, 130 stopped)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    settle_streams()
    if arguments == ["--version"]:
        print(f"kvsharer {__version__}")
        return 0
    debug = "debug=true" in (argument.lower() for argument in arguments)
    settle()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors reach us instead of Hydra's own printer
    try:
        if arguments[:1] == ["completion"]:
            print(completion.script(arguments[1:], COMMANDS), end="")
            return 0
        return _run(translate(arguments))
    except (InputError, HydraException, OmegaConfBaseException) as error:
        if debug:
            traceback.print_exc()
        print(one_line(f"kvsharer: {_one_line(error)}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kvsharer: interrupted; what was done is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as in `kvsharer --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        text = f"failed with {type(error).__name__}: {error} (debug=true shows where)"
        if _found_no_space(error):
            text = "the disk is full: free some space and run the same command again"
        print(one_line(f"kvsharer: {text}"), file=sys.stderr)
        return 1


def _run(arguments: Sequence[str]) -> int:
    if not OmegaConf.has_resolver("pid"):
        OmegaConf.register_new_resolver("pid", os.getpid)
    register(data_dir("search_spaces"))
    failures: list[BaseException] = []
    codes = [0]

    def job(composed: DictConfig) -> None:
        # Hydra prints a line of its own about an exception that leaves here: hand it over instead.
        try:
            config = to_config(composed)
            module = import_module(f"kvsharer_exp.commands.{config.command}")
            codes.append(module.run(config) or 0)
        except (Exception, KeyboardInterrupt) as error:
            failures.append(error)

    decorate: Callable[[Callable[[DictConfig], None]], Callable[[], None]] = hydra.main(
        version_base="1.3", config_path=str(data_dir("conf")), config_name="config"
    )
    before = sys.argv
    sys.argv = ["kvsharer", *arguments]
    try:
        decorate(job)()
    finally:
        sys.argv = before
    if failures:
        raise failures[0]
    return max(codes)


def translate(arguments: Sequence[str]) -> list[str]:
    """Our command line as Hydra's: flags first, then overrides.

    Raises:
        InputError: no command, an unknown one, two of them, or an unknown model.
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
                _known("flag", argument.partition("=")[0], _FLAGS)
            elif flags[-1] in _FLAG_VALUES:
                _known(flags[-1], argument, _FLAG_VALUES[flags[-1]])
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
        overrides.insert(0, f"command={_known('command', words[0], COMMANDS)}")
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
    """``run=a,b`` as the list that Hydra wants to see in brackets."""
    key, _, value = override.partition("=")
    several = key == "run" and "," in value and value[0] not in "['\""
    return f"run=[{value}]" if several else override


def _ids_as_text(override: str) -> str:
    """``run=1148e184`` as ``run='1148e184'``: such an MLflow id is a number to Hydra."""
    if override.partition("=")[0] not in ("run", "map"):
        return override
    return re.sub(r"(?<=[=,\[])(\d+e\d+)(?=[,\]]|$)", r"'\1'", override)


def _added_group(override: str) -> str:
    key, _, value = override.partition("=")
    group = key.lstrip("+")
    if group not in ("model", "experiment"):
        return override
    choices = sorted(path.stem for path in data_dir("conf").glob(f"{group}/*.yaml"))
    for name in value.split(","):  # several under -m
        _known(group, name, choices)
    return f"+{group}={value}"


def _known(what: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise InputError(_unknown(what, value, choices))
    return value


def _unknown(what: str, value: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, choices, n=1)
    listed = ", ".join(choices)
    if len(listed) > _LIST_CHARACTERS:
        listed = listed[:_LIST_CHARACTERS].rpartition(",")[0] + ", … (--help lists all)"
    others = f"choose one of {listed}" if listed else "see --help"
    hint = f"did you mean {near[0]}?" if near else others
    return f"{what} {shorten(value, 40)!r} is unknown: {hint}"


def _found_no_space(error: BaseException | None) -> bool:
    """Whether it, or what it came from, is the system's or SQLite's word for a full disk."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "database or disk is full" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _one_line(error: BaseException) -> str:
    """The error in one line; Hydra nests the telling part in its causes."""
    if isinstance(error, OmegaConfBaseException):
        return explain(error)
    if isinstance(error, HydraException) and isinstance(error.__cause__, OmegaConfBaseException):
        return explain(error.__cause__)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return _unknown(group or "configuration", option, sorted(error.options or ()))
    if isinstance(error, OverrideParseException):
        return f"{shorten(error.override)} cannot be read: check its quotes, brackets and commas"
    if isinstance(error, HydraException):
        first = str(error).strip().partition("\n")[0].rstrip(".")
        way = "give key=[a,b], or -m to run each" if first.startswith("Ambiguous") else "see --help"
        return f"{first}: {way}"
    return str(error)
