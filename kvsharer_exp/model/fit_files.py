"""Keep the fits of plans in files.

The commands keep fits in the cache folder and in the folder of a run, and an export ships them.
Such a file is a safetensors file, so it can hold nothing but numbers. Its metadata has the plan,
the place and the fingerprint of every fit, and the ``origin``: on which model and text, and how,
the fits were made. Nothing of it is believed: the numbers are hashed again when they are read.

The weights of an export hold the numbers already. There the file is JSON, with the same metadata
and the names of the numbers among the weights.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from kvsharer_exp.model.fitted_plan import Fit, FittedPlan
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.errors import MALFORMED, InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.plan_files import FITS, PLAN
from kvsharer_exp.values.text import clip, shorten
from kvsharer_exp.values.text_files import read_json, read_text

_NAMES = "names"


class FitFileError(InputError):
    """A file of fits cannot be used; the message names the file, the reason and the way out."""


def save_plan(folder: Path, fitted: FittedPlan) -> None:
    """Write ``plan.json``, and ``fits.safetensors`` where there are fits, for `read_plan`."""
    if fitted.fits:
        save_fits(folder / FITS, fitted)
    write_whole(folder / PLAN, (fitted.plan.to_json() + "\n").encode())


def save_fits(path: Path, fitted: FittedPlan) -> None:
    """Write the fits of ``fitted`` and their origin to ``path``, whole or not at all."""
    tensors = {
        f"{layer}.{name}": tensor.detach().cpu().contiguous()
        for layer, fit in sorted(fitted.fits.items())
        for name, tensor in fit.tensors.items()
    }
    write_whole(path, save(tensors, _about(fitted)))


def name_fits(path: Path, fitted: FittedPlan, names: Mapping[str, str]) -> None:
    """Write a file for `load_fits` that names the numbers among the weights in the same folder.

    ``names``: the name that each number of a fit (``5.bias``) has there.
    """
    about = {**_about(fitted), _NAMES: dict(names)}
    write_whole(path, (json.dumps(about, indent=2) + "\n").encode())


def _about(fitted: FittedPlan) -> dict[str, str]:
    fits = {
        str(layer): {"fingerprint": fit.fingerprint, "norm": fit.norm, "error": fit.error}
        for layer, fit in sorted(fitted.fits.items())
    }
    return {
        "plan": str(fitted.plan),
        "fits": json.dumps(fits),
        "origin": json.dumps(dict(fitted.origin), sort_keys=True),
    }


def fit_path(folder: Path, layer: int, action: Action) -> Path:
    """The file of one stand-in in a ``folder`` of many."""
    return folder / f"{layer}_{quote(action.text(layer), safe='')}.safetensors"


def save_fit(
    folder: Path, layer: int, action: Action, fit: Fit, num_layers: int, origin: Mapping[str, str]
) -> None:
    """Write the fit of one stand-in to its file in a ``folder`` of many."""
    alone = KVPlan.full(num_layers).replace(layer, action)
    save_fits(fit_path(folder, layer, action), FittedPlan(alone, {layer: fit}, origin))


def load_fit(
    folder: Path, layer: int, action: Action, num_layers: int, origin: Mapping[str, str]
) -> FittedPlan:
    """The plan of one stand-in alone that `save_fit` wrote; see `load_fits`."""
    alone = KVPlan.full(num_layers).replace(layer, action)
    return load_fits(fit_path(folder, layer, action), alone, origin=origin)


def save_each(folder: Path, plans: Iterable[FittedPlan], *, origin: Mapping[str, str]) -> None:
    """Write the fits of all stand-ins of ``plans``, each to its file, for `load_each`.

    A layer's stand-in is the same in every plan that has it.
    """
    each = {
        (layer, fitted.plan.actions[layer]): (fit, fitted.plan.num_layers)
        for fitted in plans
        for layer, fit in fitted.fits.items()
    }
    for (layer, action), (fit, num_layers) in each.items():
        folder.mkdir(exist_ok=True)
        save_fit(folder, layer, action, fit, num_layers, origin)


def load_each(folder: Path, plan: KVPlan) -> FittedPlan:
    """``plan`` with the fits of its stand-ins, each from its file.

    Raises:
        FitFileError: a file is missing or damaged, or its fit is of something else.
    """
    fits: dict[int, Fit] = {}
    origin: Mapping[str, str] = {}
    for layer, action in enumerate(plan.actions):
        if action.fitted:
            one = load_fit(folder, layer, action, plan.num_layers, origin)
            fits[layer], origin = one.fits[layer], one.origin
    return FittedPlan(plan, fits, origin)


def load_fits(path: Path, plan: KVPlan, *, origin: Mapping[str, str] | None = None) -> FittedPlan:
    """Read back what `save_fits` or `name_fits` wrote for ``plan``.

    ``origin``: see `check_origin`.

    Raises:
        FitFileError: the file is missing or damaged, or its fits are of another plan or origin.
    """
    metadata, tensors = _read_names(path) if path.suffix == ".json" else _read(path)
    try:
        text, about = metadata["plan"], json.loads(metadata["fits"])
        made_from = dict(json.loads(metadata["origin"]))
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
    check_origin(made_from, origin or {}, f"in {shorten(path, 40)}")
    return FittedPlan(plan, fits, made_from)


def check_origin(made_from: Mapping[str, str], origin: Mapping[str, str], where: str) -> None:
    """Refuse fits that were not made from ``origin``; what is not named there is not compared.

    Raises:
        FitFileError: they were made from something else.
    """
    for key, value in origin.items():
        if made_from.get(key) != value:
            raise FitFileError(
                f"the fits {where} are of {key} {clip(str(made_from.get(key)), 24)},"
                f" not {clip(value, 24)}: use that {key}, or give the plan as text to fit it again"
            )


def read_tensors(folder: Path, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Those tensors of ``names`` that the weights in ``folder`` hold."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")) if names else ():
        with safe_open(path, "pt") as weights:
            for name in set(names) & set(weights.keys()):
                found[name] = weights.get_tensor(name)
    return found


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


def _read_names(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What `name_fits` wrote, and the numbers that it names."""
    try:
        about = read_json(read_text(path))
        names = {str(name): str(place) for name, place in about[_NAMES].items()}
        held = read_tensors(path.parent, set(names.values()))
        return about, {name: held[place] for name, place in names.items()}
    except (*MALFORMED, OSError, SafetensorError) as error:
        raise _damaged(path, "it does not name numbers of the weights beside it") from error


def _damaged(path: Path, why: str) -> FitFileError:
    return FitFileError(
        f"the fits in {shorten(path)} are damaged ({why}): remove the file, and fit again"
    )
