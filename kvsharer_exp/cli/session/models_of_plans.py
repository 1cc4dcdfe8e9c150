"""Say of which model a plan is, before a model is loaded for it.

`Plans` and ``ablate`` call `check_model` with what ``plan=``, ``map=`` or ``compare=`` names. A run
knows its model. Where the command line names no model, the plan of another model than the default
one is refused. A model that the command line names is taken: trying the plan there may be meant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kvsharer_exp.cli.config.model import DEFAULT_MODEL, ModelConfig
from kvsharer_exp.model.folders import data_dir
from kvsharer_exp.model.given_plan import folder_of
from kvsharer_exp.model.spec import ModelSpec, hub_id, model_id
from kvsharer_exp.tracking.run_plans import run_and_choice
from kvsharer_exp.tracking.runs import Runs
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan_files import FRONT, PLAN, file_and_choice
from kvsharer_exp.values.text import clip, shorten
from kvsharer_exp.values.text_files import read_json, read_text

_RESULT = "result.json"
_OF_RUNS = (FRONT, PLAN, _RESULT)  # the files with plans in the folder of a run
_LONG = 45  # characters of an id, with which the line would be too long


def check_model(config: ModelConfig, key: str, value: Any, runs: Runs) -> None:
    """Refuse a run's plan that is of another model than the default one, if that is to be loaded.

    Args:
        config: the model that is to be loaded.
        key: the key that was given ``value``, for the message.
        value: what names the plan. What does not tell its model, as the text of a plan, is taken.
        runs: the runs of the store.

    Raises:
        InputError: the plan is of another model; the message says what to add.
    """
    of = _model_of(value, runs)
    if of is None:
        return
    choices = _choices()
    wanted = choices.get(_id_of(config.name, config.source))
    if wanted != DEFAULT_MODEL or choices.get(of) == DEFAULT_MODEL:
        return
    word = "model.source= with its place"
    if of in choices:
        word = f"model={choices[of]}"
    elif hub_id(of) and "/" in of and len(of) < _LONG:
        word = f"model.source={of}"
    raise InputError(
        f"{key}={shorten(value, 40)} is of model {clip(choices.get(of, of), 24)}, not "
        f"{DEFAULT_MODEL}: give {word} too, or the {key} as text"
    )


def _model_of(value: Any, runs: Runs) -> str | None:
    """The id of the model of the run that ``value`` names; None if that is not known."""
    named = run_and_choice(value)
    if named is not None:
        run = runs.find(named[0])
        if run is not None and run.parent_id:  # a trial's model is that of its sweep
            run = runs.find(run.parent_id)
        return run.model_id or None if run is not None else None
    folder, file = folder_of(value), file_and_choice(str(value))
    if file is not None and file[0].name in _OF_RUNS:
        folder = file[0].parent
    return None if folder is None else _recorded(folder / _RESULT)


def _recorded(path: Path) -> str | None:
    """The id of the model in a ``result.json``; None if it is not there or damaged.

    Whoever needs more of a damaged file refuses it.
    """
    try:
        held = read_json(read_text(path))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    model = held.get("model") if isinstance(held, Mapping) else None
    found = model.get("id") if isinstance(model, Mapping) else None
    return found if isinstance(found, str) else None


def _choices() -> dict[str, str]:
    """By the id of its model, the name of every file of ``conf/model/``."""
    names: dict[str, str] = {}
    for path in sorted(data_dir("conf").glob("model/*.yaml")):
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
        names[_id_of(path.stem, held["source"])] = path.stem
    return names


def _id_of(name: str, source: str) -> str:
    return model_id(ModelSpec(name, source))
