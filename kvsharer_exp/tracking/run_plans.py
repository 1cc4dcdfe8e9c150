"""Read the plan of an MLflow run, with the fits of its stand-ins.

`load_plan` is for Python. The keys ``plan=`` and ``map=`` ask `plan_of_run`.

The run of a sweep has ``front.json`` and a folder of fits among its files, the run of one plan
``result.json`` and ``fits.safetensors``. A trial has no files. It has its plan as a tag, and the
fits are among the files of the sweep if the plan came onto the front.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from kvsharer_exp.model.fit_files import FitFileError, fit_path, load_each, load_fits
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.given_plan import read_plan
from kvsharer_exp.tracking.runs import Runs, StoredRun
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.plan_files import FITS, FRONT, FRONT_FITS, holds_plans, json_of_file
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.text import clip

_RESULT = "result.json"


def load_plan(
    value: str | Path | KVPlan | SharingMap | FittedPlan,
    *,
    tracking_uri: str = "sqlite:///mlruns/mlflow.db",
) -> KVPlan | FittedPlan:
    """Load a plan: from text, a file, a folder or an MLflow run, with its fits if it has any.

    Args:
        value: the text of a plan without stand-ins that need fits (``"0_1q4_0_x"``); the path of a
            ``.json``; ``"front.json:0.25"``, the best plan of a front that keeps at most this
            fraction of the KV; ``"front.json:4"``, its map of 4 shared layers; the folder of an
            export or of a run; or an MLflow run id, with such a choice if it is a sweep.
        tracking_uri: the MLflow store of the run.

    The fits of a front's plans are in the folder ``fits`` beside it, where the sweep has put them.

    Raises:
        InputError: there is no such plan, its fits are missing or damaged, or it has stand-ins and
            is text; those are fitted by ``fit_plan``.
    """
    if isinstance(value, FittedPlan):
        return value
    named = run_and_choice(value)
    if named is None:
        plan = read_plan(value)
    else:
        plan = plan_of_run(Runs.of_store(tracking_uri), *named)
    if isinstance(plan, KVPlan) and any(action.fitted for action in plan.actions):
        return FittedPlan(plan)  # which says that the fits are missing
    return plan


def run_and_choice(value: object) -> tuple[str, str | None] | None:
    """The MLflow run id that ``RUN`` or ``RUN:CHOICE`` names, and the choice; else None.

    Raises:
        InputError: what stands behind the run is no choice.
    """
    found = re.fullmatch(r"([0-9a-f]{32})(?::(.*))?", value) if isinstance(value, str) else None
    if found is None:
        return None
    run_id, choice = found[1], found[2]
    if choice is not None and not re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", choice):
        raise InputError(
            f"{clip(choice, 20)!r} names no plan of MLflow run {run_id}: give a share of the KV "
            f"that it keeps at most, like {run_id}:0.25"
        )
    return run_id, choice


def plan_of_run(runs: Runs, run_id: str, choice: str | None = None) -> KVPlan | FittedPlan:
    """The plan of a run, as a `FittedPlan` if the fits of its stand-ins are there.

    ``choice`` names one of several, as behind a ``front.json``.

    Raises:
        InputError: there is no such run, it has no such plan, or its fits are damaged.
    """
    run = runs.find(run_id)
    if run is None:
        raise InputError(f"MLflow run {run_id} is not in this store: check tracking.uri")
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        plan = _plan(runs, run, choice, folder)
        try:
            return _with_fits(runs, run, plan, folder)
        except FitFileError as error:  # which names a copy that is gone
            raise FitFileError(
                f"fits of {clip(str(plan), 40)} among the files of MLflow run {run_id} are damaged "
                "or missing: give the plan as text to fit it again"
            ) from error


def _with_fits(runs: Runs, run: StoredRun, plan: KVPlan, folder: Path) -> KVPlan | FittedPlan:
    """``plan`` with its fits, if the run, or the sweep that it is a trial of, has any of them."""
    if not any(action.fitted for action in plan.actions):
        return plan
    if runs.copy(run.run_id, [FITS], folder):
        return load_fits(folder / FITS, plan)
    names = [
        fit_path(Path(FRONT_FITS), layer, action).as_posix()
        for layer, action in enumerate(plan.actions)
        if action.fitted
    ]
    found = runs.copy(run.parent_id or run.run_id, names, folder, under=FRONT_FITS)
    return load_each(folder / FRONT_FITS, plan) if found else plan


def map_of_run(runs: Runs, run_id: str, choice: str | None = None) -> SharingMap:
    """The map of a run.

    Raises:
        InputError: see `plan_of_run`; or its plan is no map.
    """
    plan: Any = plan_of_run(runs, run_id, choice)
    found = None if isinstance(plan, FittedPlan) else plan.sharing_map
    if found is None:
        named = run_id if choice is None else f"{run_id}:{choice}"
        raise InputError(f"MLflow run {run_id} has a plan that is no map: give plan={named}")
    return found


def _plan(runs: Runs, run: StoredRun, choice: str | None, folder: Path) -> KVPlan:
    copied = runs.copy(run.run_id, [FRONT, _RESULT], folder)
    if FRONT in copied:
        return KVPlan.from_json(json_of_file(folder / FRONT, choice, called=run.run_id))
    if _RESULT in copied and holds_plans(folder / _RESULT):
        return KVPlan.from_json(json_of_file(folder / _RESULT, choice, called=run.run_id))
    if choice is not None:
        raise InputError(f"MLflow run {run.run_id} has one plan at most: leave out :{choice}")
    if not run.plan:
        rule = "give a sweep, one of its trials or an evaluate run"
        raise InputError(f"MLflow run {run.run_id} has no plan or map: {rule}")
    return KVPlan.parse(run.plan)
