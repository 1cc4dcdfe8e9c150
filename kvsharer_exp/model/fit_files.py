"""Keep the fits of a plan in a file, and load plans with their fits.

The commands keep fits in the cache folder and in the folder of a run, and an export ships them.
Such a file is a safetensors file, so it can hold nothing but numbers. Its metadata has the plan,
the place and the fingerprint of every fit, and the ``origin``: on which model and text, and how,
the fits were made. Nothing of it is believed: the numbers are hashed again when they are read.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from kvsharer_exp.model.fitted_plan import Fit, FittedPlan
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.plan_files import (
    FITS,
    FRONT_FITS,
    PLAN,
    file_and_choice,
    json_of_folder,
)
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.text import clip, shorten


class FitFileError(InputError):
    """A file of fits cannot be used; the message names the file, the reason and the way out."""


def load_plan(value: str | Path | KVPlan | SharingMap | FittedPlan) -> KVPlan | FittedPlan:
    """Load a plan: from text, a file or a folder, with its fits if it has any.

    Args:
        value: the text of a plan without stand-ins that need fits (``"0_1q4_0_x"``); the path of a
            ``.json``; ``"front.json:0.25"``, the best plan of a front that keeps at most this
            fraction of the KV; ``"front.json:4"``, its map of 4 shared layers; or the folder of an
            export or of a run. MLflow run ids are left to the command line, which knows the store.

    The fits of a front's plans are in the folder ``fits`` beside it, where the sweep has put them.

    Raises:
        InputError: there is no such plan, its fits are missing or damaged, or it has stand-ins and
            is text; those are fitted by ``fit_plan``.
    """
    if isinstance(value, FittedPlan):
        return value
    folder = folder_of(value)
    plan = KVPlan.parse(value) if folder is None else KVPlan.from_json(json_of_folder(folder))
    if not any(action.fitted for action in plan.actions):
        return plan
    if folder is not None and (folder / FITS).is_file():
        return load_fits(folder / FITS, plan)
    front = file_and_choice(str(value))
    if folder is None and front is not None and (front[0].parent / FRONT_FITS).is_dir():
        return load_each(front[0].parent / FRONT_FITS, plan)
    return FittedPlan.of(plan)  # which says that the fits are missing


def folder_of(value: Any) -> Path | None:
    """The folder that ``value`` names; None if it names none."""
    if isinstance(value, Path) or (isinstance(value, str) and 0 < len(value) < 4096):
        path = Path(value).expanduser()
        try:
            return path if path.is_dir() else None
        except (OSError, ValueError):  # too long a name, or a zero byte: text of some other kind
            return None
    return None


def save_plan(folder: Path, fitted: FittedPlan, *, origin: Mapping[str, str]) -> None:
    """Write ``plan.json``, and ``fits.safetensors`` where there are fits, for `load_plan`."""
    if fitted.fits:
        save_fits(folder / FITS, fitted, origin=origin)
    write_whole(folder / PLAN, (fitted.plan.to_json() + "\n").encode())


def save_fits(path: Path, fitted: FittedPlan, *, origin: Mapping[str, str]) -> None:
    """Write the fits of ``fitted`` to ``path``, whole or not at all.

    ``origin``: what the fits depend on, such as the fingerprints of model and text.
    """
    tensors: dict[str, torch.Tensor] = {}
    about: dict[str, dict[str, Any]] = {}
    for layer, fit in sorted(fitted.fits.items()):
        for name, tensor in fit.tensors.items():
            tensors[f"{layer}.{name}"] = tensor.detach().cpu().contiguous()
        about[str(layer)] = {"fingerprint": fit.fingerprint, "norm": fit.norm, "error": fit.error}
    metadata = {
        "plan": str(fitted.plan),
        "fits": json.dumps(about),
        "origin": json.dumps(dict(origin), sort_keys=True),
    }
    write_whole(path, save(tensors, metadata))


def fit_path(folder: Path, layer: int, action: Action) -> Path:
    """The file of one stand-in in a ``folder`` of many."""
    return folder / f"{layer}_{quote(action.text(layer), safe='')}.safetensors"


def save_each(folder: Path, plans: Iterable[FittedPlan], *, origin: Mapping[str, str]) -> None:
    """Write the fits of all stand-ins of ``plans``, each to its file, for `load_each`.

    A layer's stand-in is the same in every plan that has it.
    """
    for fitted in plans:
        full = KVPlan.full(fitted.plan.num_layers)
        for layer, fit in fitted.fits.items():
            path = fit_path(folder, layer, action := fitted.plan.actions[layer])
            if not path.is_file():
                folder.mkdir(exist_ok=True)
                save_fits(
                    path, FittedPlan(full.replace(layer, action), {layer: fit}), origin=origin
                )


def load_each(folder: Path, plan: KVPlan) -> FittedPlan:
    """``plan`` with the fits of its stand-ins, each from its file.

    Raises:
        FitFileError: a file is missing or damaged, or its fit is of something else.
    """
    full, fits = KVPlan.full(plan.num_layers), {}
    for layer, action in enumerate(plan.actions):
        if action.fitted:
            held = load_fits(fit_path(folder, layer, action), full.replace(layer, action))
            fits[layer] = held.fits[layer]
    return FittedPlan(plan, fits)


def load_fits(path: Path, plan: KVPlan, *, origin: Mapping[str, str] | None = None) -> FittedPlan:
    """Read back what `save_fits` wrote for ``plan``.

    ``origin``: what has to be in the file's origin; what is not named here is not compared.

    Raises:
        FitFileError: the file is missing or damaged, or its fits are of another plan or origin.
    """
    metadata, tensors = _read(path)
    try:
        text, about = metadata["plan"], json.loads(metadata["fits"])
        made_from = json.loads(metadata["origin"])
        fits = {
            int(layer): Fit(
                {
                    name.partition(".")[2]: tensor
                    for name, tensor in tensors.items()
                    if name.partition(".")[0] == layer
                },
                one["norm"],
                one["error"],
            )
            for layer, one in about.items()
        }
        sound = all(fits[int(layer)].fingerprint == about[layer]["fingerprint"] for layer in about)
        sound = sound and {name.partition(".")[0] for name in tensors} <= set(about)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, "its metadata are not those of fits") from error
    if not sound:
        raise _damaged(path, "the numbers are not those that were written")
    if text != str(plan):
        raise FitFileError(
            f"the fits in {shorten(path, 40)} are of the plan {clip(text, 24)}, not of "
            f"{clip(str(plan), 24)}: give that plan, or fit again"
        )
    for key, value in (origin or {}).items():
        if made_from.get(key) != value:
            raise FitFileError(
                f"the fits in {shorten(path, 40)} are of {key} {clip(str(made_from.get(key)), 24)},"
                f" not {clip(value, 24)}: use that {key}, or give the plan as text to fit it again"
            )
    return FittedPlan(plan, fits)


def origin_of(path: Path) -> dict[str, str]:
    """The origin of the fits in a file.

    Raises:
        FitFileError: the file is missing or damaged.
    """
    try:
        return dict(json.loads(_read(path)[0]["origin"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, "its metadata are not those of fits") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` is either the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {}), {key: file.get_tensor(key) for key in file.keys()}
    except FileNotFoundError as error:
        raise FitFileError(
            f"there are no fits at {shorten(path)}: give the plan as text to fit it again"
        ) from error
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise _damaged(path, "it is no safetensors file") from error


def _damaged(path: Path, why: str) -> FitFileError:
    return FitFileError(
        f"the fits in {shorten(path)} are damaged ({why}): remove the file, and fit again"
    )
