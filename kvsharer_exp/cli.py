"""The command line: ``kvsharer COMMAND key=value …``, in any order, on top of Hydra.

Hydra knows overrides only; the bare word is ours. `translate` turns ``sweep`` into
``command=sweep`` and ``model=x`` into ``+model=x`` (a group without a default composes only so),
adds the default model, and refuses unknown words before anything is loaded.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module

import hydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvsharer_exp import __version__
from kvsharer_exp.assets import data_dir
from kvsharer_exp.config import DEFAULT_MODEL, explain, register, to_config
from kvsharer_exp.errors import InputError
from kvsharer_exp.machine import settle

COMMANDS = ("calibrate", "search", "sweep", "evaluate", "bench", "export", "generate", "ui")
_FLAGS_WITH_VALUE = (
    *("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-dir", "-cd"),
    *("--config-name", "-cn", "--config-path", "-cp", "--experimental-rerun"),
)
_FLAGS_WITHOUT_COMMAND = ("--help", "-h", "--hydra-help", "--shell-completion", "-sc")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code (0 done, 1 failed, 2 bad input, 130 stopped)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"kvsharer {__version__}")
        return 0
    debug = "debug=true" in (argument.lower() for argument in arguments)
    settle()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors reach us instead of Hydra's own printer
    try:
        return _run(translate(arguments))
    except (InputError, HydraException, OmegaConfBaseException) as error:
        if debug:
            traceback.print_exc()
        print(f"kvsharer: {_one_line(error)}", file=sys.stderr)
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
        name, text = type(error).__name__, " ".join(str(error).split())
        print(f"kvsharer: failed with {name}: {text} (debug=true shows where)", file=sys.stderr)
        return 1


def _run(arguments: Sequence[str]) -> int:
    if not OmegaConf.has_resolver("pid"):
        OmegaConf.register_new_resolver("pid", os.getpid)
    register(data_dir("search_spaces"))
    failures: list[BaseException] = []

    def job(composed: DictConfig) -> None:
        # Hydra prints a line of its own about an exception that leaves here: hand it over instead.
        try:
            config = to_config(composed)
            module = import_module(f"kvsharer_exp.commands.{config.command}")
            module.run(config)
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
    return 0


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
        if expects_value or argument.startswith("-"):
            flags.append(argument)
            expects_value = not expects_value and argument in _FLAGS_WITH_VALUE
        elif "=" in argument or argument.startswith("~"):
            overrides.append(argument)
        else:
            words.append(argument)
    if len(words) > 1:
        raise InputError(f"two commands given ({', '.join(words)}): give one")
    if words:
        overrides.insert(0, f"command={_known('command', words[0], COMMANDS)}")
    elif not any(flag in _FLAGS_WITHOUT_COMMAND for flag in flags):
        raise InputError(f"no command given: choose one of {', '.join(COMMANDS)}, or --help")
    models = sorted(path.stem for path in data_dir("conf").glob("model/*.yaml"))
    overrides = [_model_override(override, models) for override in overrides]
    if not any(override.startswith("+model=") for override in overrides):
        overrides.append(f"+model={DEFAULT_MODEL}")
    return [*flags, *overrides]


def _model_override(override: str, models: Sequence[str]) -> str:
    key, _, value = override.partition("=")
    if key not in ("model", "+model", "++model"):
        return override
    for name in value.split(","):  # several under -m
        _known("model", name, models)
    return f"+model={value}"


def _known(what: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise InputError(_unknown(what, value, choices))
    return value


def _unknown(what: str, value: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, choices, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(choices)}"
    return f"{what} {value!r} is unknown: {hint}"


def _one_line(error: BaseException) -> str:
    """The error in one line; Hydra nests the telling part in its causes."""
    if isinstance(error, OmegaConfBaseException):
        return explain(error)
    if isinstance(error, HydraException) and isinstance(error.__cause__, OmegaConfBaseException):
        return explain(error.__cause__)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return _unknown(group, option, sorted(error.options or ()))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) if lines else type(error).__name__
