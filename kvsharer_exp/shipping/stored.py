"""Read from an export what the stock model has no place for, or says nothing about.

`load_exported` needs it: the plan of config.json, the numbers of stand-ins, and the query rows of
fused projections.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from kvsharer_exp.model.actions.check import check_plan
from kvsharer_exp.model.actions.registry import runner_of
from kvsharer_exp.model.actions.stand_in import StandInRunner
from kvsharer_exp.model.fit_files import read_tensors
from kvsharer_exp.model.fitted_plan import Fit, FittedPlan
from kvsharer_exp.model.sharing.architectures import AttentionLayer, attention_layers
from kvsharer_exp.model.sharing.projections import QueryRows
from kvsharer_exp.shipping.exported_config import TYPE_PREFIX
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.text import clip, shorten

AGAIN = "export it again"


def read_plan(folder: Path) -> tuple[KVPlan, dict[int, str]]:
    """The plan of an export, and by layer the norm that a stand-in replaces.

    Raises:
        InputError: ``folder`` is no export, or what its config.json says is no plan.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{shorten(folder)} is no export, there is no config.json: give one")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        known = config.get("kv_source_layers"), config.get("kv_plan")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{shorten(path)} is no JSON object: {AGAIN}") from error
    if known == (None, None):
        raise InputError(
            f"{shorten(folder)} is no export: its config.json has no kv_plan and "
            "has no kv_source_layers; use load_model for other models"
        )
    sources, text = known
    if text is None:
        return KVPlan.of(SharingMap.parse(sources)), {}
    if sources is not None:
        raise InputError(
            f"{shorten(path)} has both kv_source_layers and kv_plan, so it is of no one export: "
            f"{AGAIN}"
        )
    try:
        return _plan(text), _norms(config.get("kv_plan_norms"))
    except (InputError, ValueError) as error:
        raise InputError(f"{shorten(path)}: kv_plan: {clip(str(error), 80)}: {AGAIN}") from error


def stock_config(folder: Path) -> Any:
    """The configuration of the stock model of an export, also of one of an earlier version.

    Raises:
        OSError, ValueError, KeyError: transformers cannot read it.
    """
    held, _ = PreTrainedConfig.get_config_dict(folder)
    held["model_type"] = str(held["model_type"]).removeprefix(TYPE_PREFIX)
    return AutoConfig.for_model(**held)


def _plan(text: object) -> KVPlan:
    if not isinstance(text, str) or text.lstrip().startswith(("{", "[")) or ".json" in text:
        raise InputError(f"{clip(repr(text), 30)} is no text: give one like 0_1q4_0_x")
    return KVPlan.parse(text)


def _norms(held: object) -> dict[int, str]:
    if held is None:
        return {}
    if not isinstance(held, dict) or not all(isinstance(name, str) for name in held.values()):
        raise InputError(f"kv_plan_norms {clip(repr(held), 30)}: give norms by layer")
    return {int(layer): name for layer, name in held.items()}


def stand_in_tensors(model: Any, plan: KVPlan) -> dict[int, dict[str, str]]:
    """By layer, the names that the numbers of its stand-in have among the weights of ``model``."""
    places = {id(module): name for name, module in model.named_modules()}
    found: dict[int, dict[str, str]] = {}
    for layer, action in zip(attention_layers(model), plan.actions, strict=True):
        runner = runner_of(action)
        if isinstance(runner, StandInRunner):
            at = places[id(layer.attention)]
            found[layer.index] = {name: f"{at}.{name}" for name in runner.tensors}
    return found


def read_fits(
    model: Any, plan: KVPlan, norms: Mapping[int, str], folder: Path
) -> tuple[FittedPlan, set[str]]:
    """Read the stand-ins of ``plan`` for the stock ``model``: the plan with fits, and their names.

    Raises:
        InputError: a tensor of a stand-in or the norm it replaces is not there, or has the wrong
            shape.
        SharingError: the plan does not fit the model.
    """
    if plan.sharing_map is not None:
        return FittedPlan(plan), set()
    layers = attention_layers(model)
    check_plan(plan, layers)
    wanted = stand_in_tensors(model, plan)
    names = {stored for tensors in wanted.values() for stored in tensors.values()}
    held = read_tensors(folder, names)
    fits = {}
    for index, tensors in wanted.items():
        hidden = layers[index].hidden_size
        shapes = {"weight": (hidden, hidden), "bias": (hidden,)}
        for name, stored in tensors.items():
            if stored not in held or tuple(held[stored].shape) != shapes[name]:
                raise InputError(
                    f"{shorten(folder)} is not whole: it lacks {shorten(stored)} of shape "
                    f"{shapes[name]}; {AGAIN}"
                )
        found = {name: held[stored] for name, stored in tensors.items()}
        fits[index] = Fit(found, _norm(layers[index], norms.get(index), folder))
    if stray := norms.keys() - wanted.keys():
        raise InputError(
            f"{shorten(folder)} replaces the norm of layer {min(stray)}, which has no stand-in: "
            f"{AGAIN}"
        )
    return FittedPlan(plan, fits), names


def _norm(layer: AttentionLayer, name: str | None, folder: Path) -> str | None:
    parts = {part for part, _ in layer.block.named_children()} - {layer.name}
    if name is not None and name not in parts:
        raise InputError(
            f"{shorten(folder)} replaces {clip(name, 30)} of layer {layer.index}, which has no "
            f"such part: {AGAIN}"
        )
    return name


def fill_fused(model: Any, folder: Path) -> tuple[set[str], set[str]]:
    """Read the query rows of targets' fused projections into ``model``.

    Returns:
        The names of all such parameters, and of those that were found in ``folder``.
    """
    stubs = {name: m for name, m in model.named_modules() if isinstance(m, QueryRows)}
    parameters = {
        f"{name}.{part}": value
        for name, stub in stubs.items()
        for part, value in stub.named_parameters()
    }
    filled = set()
    for name, stored in read_tensors(folder, parameters).items():
        if stored.shape == parameters[name].shape:
            with torch.no_grad():
                parameters[name].copy_(stored)
            filled.add(name)
    return set(parameters), filled
