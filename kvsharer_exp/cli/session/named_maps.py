"""``map=``: the maps it can name, as text, a file, or a run of the MLflow store."""

from __future__ import annotations

import re

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.tracking.tracker import Tracker
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.sharing_map import SharingMap


def read_map(config: Config, tracker: Tracker) -> SharingMap:
    """The one map of ``map=``: text, a list, a path to a .json, or the id of an MLflow run.

    Raises:
        InputError: none given, or none of these.
    """
    value = config.map
    if value is None:
        raise InputError("no map given: map=0_1_0_3, map=path.json or map=<MLflow run id>")
    if _is_run_id(value):
        return tracker.find_map(value)
    return SharingMap.parse(str(value) if isinstance(value, int) else value)


def read_maps(config: Config, tracker: Tracker) -> tuple[SharingMap, ...]:
    """All maps of ``map=``: those on the front where it names a finished sweep, else the one map.

    Raises:
        InputError: see `read_map`.
    """
    front = tracker.front_maps(config.map) if _is_run_id(config.map) else []
    return tuple(front) or (read_map(config, tracker),)


def _is_run_id(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) is not None
