"""Read the maps that ``map=`` names, as text, as a file, or as a run of the MLflow store."""

from __future__ import annotations

import re

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.tracking.tracker import Tracker
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.sharing_map import SharingMap


def read_map(config: Config, tracker: Tracker) -> SharingMap:
    """The one map that ``map=`` names: text, a list, the path of a .json, or an MLflow run id.

    Raises:
        InputError: ``map=`` is not given, or it is none of these.
    """
    value = config.map
    if value is None:
        raise InputError("no map given: map=0_1_0_3, map=path.json or map=<MLflow run id>")
    if is_run_id(value):
        return tracker.find_map(value)
    return SharingMap.parse(str(value) if isinstance(value, int) else value)


def read_maps(config: Config, tracker: Tracker) -> tuple[SharingMap, ...]:
    """The maps on the front if ``map=`` names a finished sweep, and else the one map that it names.

    Raises:
        InputError: see `read_map`.
    """
    front = tracker.front_maps(config.map) if is_run_id(config.map) else []
    return tuple(front) or (read_map(config, tracker),)


def is_run_id(value: object) -> bool:
    """Whether ``value`` has the form of an MLflow run id."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) is not None
