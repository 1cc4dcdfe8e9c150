"""Ship a map or plan: write a model folder without the weights that it does not need, and load it.

The command ``export`` writes the folder. `load_exported` is for users of this package.

The folder is an ordinary transformers one. `load_exported` builds the stock model and puts the plan
into it. Without this package ``AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)`` does the same, with the code beside the weights: of a map the file
`exported_model`, of another plan the files of `plan_code`.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvsharer_exp.model.fit_files import name_fits, read_tensors
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.load import quiet_transformers
from kvsharer_exp.model.sharing.permanent import make_plan
from kvsharer_exp.shipping.plan_code import plan_files
from kvsharer_exp.shipping.shipped_code import others_of, ship_code
from kvsharer_exp.shipping.stored import (
    fill_fused,
    read_fits,
    read_plan,
    stand_in_tensors,
    stock_config,
)
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.plan_files import EXPORT_FITS
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.text import shorten

_PLAN_FILES = ("sharing_map.json", "kv_plan.json")


def plan_file(plan: KVPlan) -> str:
    """The name of the file in an export that holds ``plan``."""
    return _PLAN_FILES[0 if plan.sharing_map is not None else 1]


def check_destination(path: Path, *, overwrite: bool) -> None:
    """Refuse a ``path`` that `write_export` would refuse, before any work is done.

    Raises:
        InputError: ``path`` is a file, or a folder that is not empty without ``overwrite``, or a
            folder that holds something other than an export, which is never replaced.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"export.path={shorten(path)} is a file: give a folder that is not there")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise InputError(
            f"export.path={shorten(path)} is not empty: give another export.path, or "
            "export.overwrite=true to replace an earlier export"
        )
    if not any((path / name).is_file() for name in _PLAN_FILES):
        raise InputError(
            f"export.path={shorten(path)} holds something that is no export "
            f"(no {' or '.join(_PLAN_FILES)}): give another export.path"
        )


def check_model(model: Any) -> None:
    """Refuse a model that cannot be exported.

    Raises:
        InputError: its class is not transformers' own, so that the export would need code that is
            not ours to ship; or its weights are quantised, and an export would not load them.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError(
            "the weights of this model are quantised: load it without its quantization_config to "
            "export it (the plan runs with both)"
        )
    name = type(model).__name__
    if getattr(transformers, name, None) is not type(model):
        raise InputError(
            f"{name} is not a class of transformers: load the model without "
            "model.trust_remote_code to export it"
        )


def check_actions(plan: KVPlan) -> None:
    """Refuse a plan with an action of another package whose code cannot be copied.

    Raises:
        InputError: see `ForeignCode`.
    """
    if others := others_of(plan):
        plan_files("LlamaForCausalLM", "LlamaConfig", others)


def write_export(
    model: Any,
    tokenizer: Any,
    plan: FittedPlan | KVPlan | SharingMap,
    path: Path,
    *,
    card: str,
    overwrite: bool = False,
) -> int:
    """Put ``plan`` into ``model`` for good and write it to ``path``; returns the weights' bytes.

    The folder is written beside ``path`` and then renamed, so that a run which is killed leaves no
    half-written export there.

    Raises:
        InputError: see `check_destination`, `check_model` and `check_actions`; or the plan has
            stand-ins without fits.
        SharingError: the plan does not fit the model.
    """
    check_destination(path, overwrite=overwrite)
    check_model(model)
    fitted = FittedPlan.of(plan)
    check_actions(fitted.plan)
    places = stand_in_tensors(model, fitted.plan) if fitted.fits else {}
    make_plan(model, fitted)
    ship_code(model, fitted)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.partial-"
    with (
        tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as partial,
        quiet_transformers(),
    ):
        folder = Path(partial) / "new"
        folder.mkdir()  # only its owner could read the temporary folder itself
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):  # only their owner can read them
            weights.chmod((folder / "config.json").stat().st_mode)
        text = fitted.plan.to_json() + "\n"
        (folder / plan_file(fitted.plan)).write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
        if fitted.fits:
            _name_fits(folder, fitted, places)
        if path.is_dir() and any(path.iterdir()):
            os.replace(path, Path(partial) / "old")
        os.replace(folder, path)
    return sum(weights.stat().st_size for weights in path.glob("*.safetensors"))


def _name_fits(folder: Path, fitted: FittedPlan, places: dict[int, dict[str, str]]) -> None:
    """Say which of the weights in ``folder`` are the fits, for `read_plan`."""
    held_at = {i: parts for i, parts in places.items() if i in fitted.fits}
    names = {f"{i}.{part}": name for i, parts in held_at.items() for part, name in parts.items()}
    held = read_tensors(folder, set(names.values()))
    fits = {
        i: replace(fitted.fits[i], tensors={part: held[name] for part, name in parts.items()})
        for i, parts in held_at.items()
    }
    name_fits(folder / EXPORT_FITS, replace(fitted, fits=fits), names)


def load_exported(folder: str | Path) -> tuple[Any, Any]:
    """Load (model, tokenizer) from an export: the stock model, under its plan for good.

    No code from the folder is run. The model is in eval mode, on the CPU, in the dtype in which it
    was exported.

    Raises:
        InputError: ``folder`` is not an export, or its weights do not fit its model exactly.
        SharingError: the map or plan in ``folder`` does not fit its model.
    """
    folder = Path(folder).expanduser()
    plan, norms = read_plan(folder)
    with quiet_transformers():
        try:
            config = stock_config(folder)
            tokenizer = AutoTokenizer.from_pretrained(
                folder, config=config, trust_remote_code=False
            )
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `fill_fused` fills the targets' fused projections
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:80]
            raise InputError(
                f"{shorten(folder)} cannot be loaded ({reason}): export it again"
            ) from error
    model, info = loaded
    stock = set(model.state_dict())
    fitted, fits = read_fits(model, plan, norms, folder)
    model = make_plan(model.eval(), fitted).requires_grad_(False)
    ship_code(model, fitted)
    held, missing = set(model.state_dict()), set(info["missing_keys"]) - fits
    rows, filled = fill_fused(model, folder)
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    wrong = {
        "lacks": missing & held,
        "has the wrong shape of": (mismatched & held - rows) | (rows - filled - missing),
        "has besides": (set(info["unexpected_keys"]) - fits) | (stock - held - missing),
    }
    for what, keys in wrong.items():
        if keys:
            raise InputError(
                f"{shorten(folder)} is not whole: it {what} {shorten(min(keys))} "
                f"({len(keys)} such); export it again"
            )
    return model, tokenizer
