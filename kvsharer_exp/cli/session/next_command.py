"""Write the command to try next, so that it can be copied and runs on what this command ran on.

Every command prints such a line in the end. It keeps the user's own words: those that name model,
texts, scores and store, or all of them where the same command is to go on.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Sequence

from hydra.core.hydra_config import HydraConfig

from kvsharer_exp.cli.config.names import WITHOUT_MODEL
from kvsharer_exp.cli.config.schema import Config

_STORE = ("tracking",)
_SHARED = ("model", "calibration", "heldout", "fit", "footprint", "scoring", "seed", *_STORE)
_SEARCHED = {command: ("compression", "search") for command in ("search", "sweep")}
_ONCE = ("command", "quiet", "debug", "study.fresh")  # what the same command does not say again


def next_command(config: Config, command: str, *words: str) -> str:
    """The line of another command, with ``words`` for it, which are written for a shell."""
    groups = (*_SHARED, *_SEARCHED.get(command, ()))
    if command in WITHOUT_MODEL:
        groups = _STORE
    kept = (word for word in _given(config) if re.split("[.=@]", _key(word))[0] in groups)
    return _line(command, words, kept)


def same_command(config: Config, *words: str, without: Collection[str] = ()) -> str:
    """The line of this command with ``words`` more; the keys ``without`` are left out."""
    left_out = (*_ONCE, *without)
    kept = (word for word in _given(config) if _key(word) not in left_out)
    return _line(config.command, words, kept)


def _given(config: Config) -> list[str]:
    """The overrides of this command line; of one within `reproduce` the model and the store."""
    given = list(HydraConfig.get().overrides.task)
    if f"command={config.command}" in given:
        return given
    return [f"model={config.model.name}", *(word for word in given if word.startswith("tracking."))]


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _line(command: str, words: Sequence[str], kept: Iterable[str]) -> str:
    """Model first, and the user's folders of groups, which may hold it, last."""
    written = [word.removeprefix("+") if word.startswith("+model=") else word for word in kept]
    models = [word for word in written if word.startswith("model=")]
    others = [word for word in written if word not in models]
    hydra = HydraConfig.get()
    others += [word for word in hydra.overrides.hydra if _key(word) == "hydra.searchpath"]
    for source in hydra.runtime.config_sources:
        others += ["--config-dir", source.path] if source.provider == "command-line" else []
    parts = [command, *map(shlex.quote, models), *words, *map(shlex.quote, others)]
    return " ".join(["kvsharer", *parts])
