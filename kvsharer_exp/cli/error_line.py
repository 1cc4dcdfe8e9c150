"""Turn any error into one line for the person who caused it; `main` prints that line."""

from __future__ import annotations

import errno

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from kvsharer_exp.cli.argv import unknown
from kvsharer_exp.cli.config.compose import explain
from kvsharer_exp.values.text import shorten


def found_no_space(error: BaseException | None) -> bool:
    """Whether ``error``, or one that led to it, is the system's or SQLite's for a full disk."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "database or disk is full" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def error_line(error: BaseException) -> str:
    """Say the error in one line. Hydra hides the telling part in the causes of its errors."""
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
