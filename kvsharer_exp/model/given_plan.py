"""Read a plan that a user names by text, a file or a folder, with the fits that lie beside it.

`load_plan` and the key ``plan=`` read plans here, and those of MLflow runs from files of the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvsharer_exp.model.fit_files import load_each, load_fits
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.plan_files import (
    EXPORT_FITS,
    FITS,
    FRONT_FITS,
    file_and_choice,
    json_of_folder,
)


def read_plan(value: Any) -> KVPlan | FittedPlan:
    """The plan that ``value`` names, as a `FittedPlan` if the fits of its stand-ins lie there.

    Args:
        value: whatever `KVPlan.parse` reads, or the folder of an export or of a run. The fits are
            in that folder, or in the folder ``fits`` beside a ``front.json``.

    Raises:
        InputError: there is no such plan, or its fits are damaged.
    """
    folder = folder_of(value)
    plan = KVPlan.parse(value) if folder is None else KVPlan.from_json(json_of_folder(folder))
    if not any(action.fitted for action in plan.actions):
        return plan
    if folder is not None:
        held = [folder / name for name in (FITS, EXPORT_FITS) if (folder / name).is_file()]
        return load_fits(held[0], plan) if held else plan
    front = file_and_choice(str(value))
    if front is not None and (front[0].parent / FRONT_FITS).is_dir():
        return load_each(front[0].parent / FRONT_FITS, plan)
    return plan


def folder_of(value: Any) -> Path | None:
    """The folder that ``value`` names; None if it names none."""
    if isinstance(value, Path) or (isinstance(value, str) and 0 < len(value) < 4096):
        path = Path(value).expanduser()
        try:
            return path if path.is_dir() else None
        except (OSError, ValueError):  # too long a name, or a zero byte: text of some other kind
            return None
    return None
