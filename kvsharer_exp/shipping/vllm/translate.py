"""What the plan of an export means in vLLM, and which plans vLLM cannot do.

The plugin asks before it builds a model, and ``kvsharer serve`` before it starts a server. Nothing
here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvsharer_exp.shipping.exported_config import ARCHITECTURE_PREFIX
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.actions.read import Read
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.text import shorten
from kvsharer_exp.values.vllm_support import FAMILIES, cannot


def engine_plan(config: Mapping[str, Any]) -> KVPlan:
    """The plan of an export, by its ``config`` (that of config.json), if vLLM can run it.

    Raises:
        InputError: the folder is no export or an earlier one, vLLM has no model of this family
            that takes a plan, or a layer does what vLLM cannot do.
    """
    (name, *_) = config.get("architectures") or ("",)
    stock = str(name).removeprefix(ARCHITECTURE_PREFIX)
    sources, text = config.get("kv_source_layers"), config.get("kv_plan")
    if sources is None and text is None:
        raise InputError(
            "config.json has neither kv_source_layers nor kv_plan: give a folder that kvsharer "
            "export wrote"
        )
    if stock == name:
        raise InputError(
            f"architecture {shorten(name, 40)} in config.json is of an export by an earlier "
            "version, which vLLM would load without its plan: export it again"
        )
    if stock not in FAMILIES:
        raise InputError(
            f"{shorten(stock, 40)} runs under no plan in vLLM: use load_exported, or a model "
            f"of {', '.join(family.model_type for family in FAMILIES.values())}"
        )
    plan = KVPlan.parse(str(text)) if sources is None else KVPlan.of(SharingMap.parse(sources))
    check_plan(plan)
    return plan


def check_plan(plan: KVPlan) -> None:
    """Refuse a plan that vLLM cannot run.

    Raises:
        InputError: the message names the first such layer, the reason, and the nearest plan.
    """
    for layer, action in enumerate(plan.actions):
        if reason := cannot(action):
            nearest = shorten(str(nearest_plan(plan)), 80)
            raise InputError(f"layer {layer} {reason} in vLLM: use load_exported, or {nearest}")


def nearest_plan(plan: KVPlan) -> KVPlan:
    """``plan`` with the nearest actions that vLLM can do: 16 bits, or the keys' source for both."""
    actions: list[Action] = []
    for layer, action in enumerate(plan.actions):
        source = action.keys_from(layer)
        reads = source is not None and source != layer and plan.value_sources[source] == source
        near = Read(source) if reads and source is not None else Own()
        actions.append(near if cannot(action) else action)
    return KVPlan(tuple(actions))
