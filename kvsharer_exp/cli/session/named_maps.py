"""Read the maps that ``map=`` names, as text, as a file, or as a run of the MLflow store."""

from __future__ import annotations

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.models_of_plans import check_model
from kvsharer_exp.tracking.run_plans import map_of_run, run_and_choice
from kvsharer_exp.tracking.tracker import Tracker
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.sharing_map import SharingMap


def read_map(config: Config, tracker: Tracker) -> SharingMap:
    """The one map that ``map=`` names: text, a list, the path of a .json, or an MLflow run id.

    Raises:
        InputError: ``map=`` is not given, or it is none of these; or it is of another model, and no
            model is given.
    """
    value = config.map
    if value is None:
        raise InputError("no map given: map=0_1_0_3, map=path.json or map=<MLflow run id>")
    check_model(config.model, "map", value, tracker.runs)
    named = run_and_choice(value)
    if named is not None:
        return map_of_run(tracker.runs, *named)
    return SharingMap.parse(str(value) if isinstance(value, int) else value)


def read_maps(config: Config, tracker: Tracker) -> tuple[SharingMap, ...]:
    """The maps on the front if ``map=`` names a finished sweep, and else the one map that it names.

    Raises:
        InputError: see `read_map`.
    """
    run_id, choice = run_and_choice(config.map) or (None, None)
    check_model(config.model, "map", config.map, tracker.runs)
    front = tracker.front_maps(run_id) if run_id and choice is None else []
    return tuple(front) or (read_map(config, tracker),)
