"""Turn the configuration that Hydra composes into a checked `Config`.

`main` calls `register` before Hydra composes, and `to_config` after. `to_yaml` writes a `Config` so
that `to_config` can read it again. `explain` turns what OmegaConf says of a wrong key or value into
one line.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvsharer_exp.cli.argv import help_lines
from kvsharer_exp.cli.config.names import model_prefix
from kvsharer_exp.cli.config.schema import Config, config_keys
from kvsharer_exp.cli.config.text_keys import TextKey, expand_home, literal, text_keys
from kvsharer_exp.values.errors import InputError


def register(search_spaces: Path) -> None:
    """Put the schema and every file of the folder ``search_spaces`` in Hydra's store.

    The resolvers that ``conf/config.yaml`` uses are registered as well: ``pid``, ``model_prefix``,
    and ``commands`` for the list in ``--help``.
    """
    for resolver in (("pid", os.getpid), ("commands", help_lines), ("model_prefix", model_prefix)):
        OmegaConf.register_new_resolver(*resolver, replace=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for path in sorted(search_spaces.glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        store.store(group="search_space", name=path.stem, node=content, provider=str(path))


def to_config(composed: DictConfig) -> Config:
    """Return ``composed`` as a `Config` whose keys, types and ranges are checked.

    References like ``${seed}`` are resolved, and the ``~`` of every path is expanded.

    Raises:
        InputError: a key is unknown (also one added with ``+``), or a value has the wrong type, is
            out of range or is not finite.
    """
    try:
        plain: Any = OmegaConf.to_container(composed, resolve=True)
        merged = OmegaConf.merge(OmegaConf.structured(Config), _settled(plain))
        for key, number in _floats(OmegaConf.to_container(merged)):
            if not math.isfinite(number):
                raise InputError(f"{key}={number}: give a finite number")
        config = OmegaConf.to_object(merged)
        assert isinstance(config, Config)
    except OmegaConfBaseException as error:
        raise InputError(explain(error)) from error
    for key, kind in _TEXT.items():
        group, _, name = key.rpartition(".")
        section = plain.get(group)  # the text ??? where all in it is as by default
        if kind.verbatim and isinstance(section, dict) and section.get(name) == MISSING:
            setattr(getattr(config, group), name, MISSING)
    return config


def to_yaml(config: Config) -> str:
    """Write ``config`` as YAML that `to_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(_settled(asdict(config))))


_TEXT, _PLAIN = text_keys(Config), TextKey()


def _settled(node: Any, key: str = "") -> Any:
    """Return ``node`` with the ``~`` of its paths expanded, and every text as it is meant.

    What was resolved before may hold ``${``, which is text now.
    """
    if isinstance(node, dict):
        return {name: _settled(inner, f"{key}.{name}".lstrip(".")) for name, inner in node.items()}
    if isinstance(node, list):
        return [_settled(inner, key) for inner in node]
    if not isinstance(node, str):
        return node
    return literal(expand_home(node) if _TEXT.get(key, _PLAIN).path else node)


def _floats(node: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(node, float):
        yield key, node
    elif isinstance(node, dict):
        for name, inner in node.items():
            yield from _floats(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for inner in node:
            yield from _floats(inner, key)


def explain(error: OmegaConfBaseException) -> str:
    """Say in one line what OmegaConf refuses; the line names the key and the way out."""
    first = str(error).strip().splitlines()[0]
    key = getattr(error, "full_key", None) or ""
    if "not in" in first and ".options." in key:
        return f"{key} is not in the file of this {key.partition('.')[0]}: give it as +{key}=…"
    if "not in" in first and key:
        near = difflib.get_close_matches(key, config_keys(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "kvsharer --help lists the keys"
        return f"{key} is not a key of the configuration: {hint}"
    value = re.search("(?<=Value ').*?(?=')", first)
    for sign, way in _WAYS.items():
        if sign in first:
            return f"{key}={value.group()}: {way}" if value else f"{key}: {way}"
    return f"{key}: {first}, see --help" if key else f"{first}, see --help"


# What OmegaConf says of a value → what to give instead.
_WAYS = {
    "to Integer": "give a whole number",
    "to Float": "give a number",
    "valid bool": "give true or false",
    "not Optional": "give a value, not null",
    "not a ListConfig": "give a list, like [a,b]",
    "not a subclass": "give its keys, see --help",
}
