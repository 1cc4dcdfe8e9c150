"""Turn any error into one line for the person who caused it, and an exit code, for `main`."""

from __future__ import annotations

import errno
from typing import TypeGuard

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from kvsharer_exp.cli.argv import unknown
from kvsharer_exp.cli.config.compose import explain
from kvsharer_exp.values.errors import InputError, UnansweredError
from kvsharer_exp.values.text import shorten


def verdict(error: Exception) -> tuple[str, int]:
    """What to say of ``error``, and the exit code: 2 after bad input, 1 after any other failure."""
    if is_bad_input(error):
        return error_line(error), 2
    if isinstance(error, UnansweredError):
        return str(error), 1
    if found_no_space(error):
        return "the disk is full: free some space and run the same command again", 1
    return f"failed with {type(error).__name__}: {error} (debug=true shows where)", 1


def is_bad_input(error: Exception) -> bool:
    """Whether what the user gave caused ``error``. Any path may be one that no system can hold."""
    known = isinstance(error, (InputError, HydraException, OmegaConfBaseException))
    return known or _is_too_long(error)


def _is_too_long(error: BaseException) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG


def found_no_space(error: BaseException | None) -> bool:
    """Whether ``error``, or one that led to it, is the system's or SQLite's for a full disk."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "database or disk is full" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def error_line(error: BaseException) -> str:
    """Say in one line what was wrong with the input; Hydra hides it in the causes of its errors."""
    if _is_too_long(error):
        return f"{shorten(error.filename or error)} is too long for a path: give a shorter one"
    if isinstance(error, OmegaConfBaseException):
        return explain(error)
    if isinstance(error, HydraException) and isinstance(error.__cause__, OmegaConfBaseException):
        return explain(error.__cause__)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return unknown(group or "configuration", option, sorted(error.options or ()))
    if isinstance(error, OverrideParseException):
        return f"{shorten(error.override)} cannot be read: check its quotes, brackets and commas"
    if isinstance(error, HydraException):
        first = str(error).strip().partition("\n")[0].rstrip(".")
        way = "give key=[a,b], or -m to run each" if first.startswith("Ambiguous") else "see --help"
        return f"{first}: {way}"
    return str(error)
