"""Send the code with the weights: whatever saves a model that shares KV writes how to load it too.

`write_export` and `load_exported` call `ship_code`. From then on ``model.save_pretrained``, and so
``model.push_to_hub``, writes code beside the weights, with the model's own class in it, and names
it in config.json. The code of a map is the file `exported_model`. A plan that does more than a map
needs the files of `plan_code`. A model that transformers has loaded from such files needs no help:
transformers copies them whenever it saves the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.projections import FusedProjection
from kvsharer_exp.shipping.exported_config import TYPE_PREFIX, own_architecture
from kvsharer_exp.shipping.plan_code import (
    CONFIG,
    PLAN_CLASS,
    PLAN_CODE,
    PLAN_CONFIG,
    plan_files,
    with_stock,
)
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.registry import OURS
from kvsharer_exp.values.plan import KVPlan

_CODE, _CLASS = "modeling_kv_shared", "KVSharedForCausalLM"
_CONFIG, _CONFIG_CLASS = "configuration_kv_shared", "KVSharedConfig"
_OF_THE_HUB = ("repo_id", "commit_message", "create_pr", "private")


def ship_code(model: Any, plan: FittedPlan) -> None:
    """Make whatever saves ``model`` write the code and the configuration that load it again.

    Call it on a model of a transformers class that runs under ``plan`` for good.
    """
    is_map = plan.plan.sharing_map is not None
    if is_map:
        model.config.kv_sharing = _how(model)
    else:
        without = {i for i, source in enumerate(plan.plan.key_sources) if source is None}
        norms = {layer: plan.fits[layer].norm for layer in sorted(without & plan.fits.keys())}
        model.config.kv_plan_norms = {str(layer): norm for layer, norm in norms.items() if norm}
    code, name = (_CODE, _CLASS) if is_map else (PLAN_CODE, PLAN_CLASS)
    model.config.auto_map = {
        "AutoConfig": f"{_CONFIG if is_map else PLAN_CONFIG}.{_CONFIG_CLASS}",
        "AutoModelForCausalLM": f"{code}.{name}",
    }
    model.save_pretrained = _SaveWithCode(model, is_map, others_of(plan.plan))


def others_of(plan: KVPlan) -> tuple[type[Action], ...]:
    """The kinds of actions in ``plan`` that other packages bring."""
    return tuple(kind for kind in dict.fromkeys(map(type, plan.actions)) if kind not in OURS)


@dataclass(slots=True, eq=False)
class _SaveWithCode:
    """The ``save_pretrained`` of ``model``: that of its class, and the code in the same folder.

    The configuration is written under the names of an export (`exported_config`). It is an object
    and no closure, so that a deep copy of the model saves itself.
    """

    model: Any
    is_map: bool
    others: tuple[type[Action], ...]

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *args: Any,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        upload = {
            name: options.pop(name) for name in _OF_THE_HUB if push_to_hub and name in options
        }
        stock = type(self.model)
        stock.save_pretrained(self.model, save_directory, is_main_process, *args, **options)
        folder = Path(save_directory)
        if is_main_process:
            classes = stock.__name__, type(self.model.config).__name__
            files = _map_files(*classes) if self.is_map else plan_files(*classes, self.others)
            for name, text in files.items():
                (folder / name).write_text(text, encoding="utf-8")
            _name_as_export(folder / "config.json")
        if push_to_hub:  # saves again, to a folder of its own, and uploads all of that
            upload.setdefault("repo_id", folder.name)
            self.model.push_to_hub(**upload, token=options.get("token"))


def _how(model: Any) -> dict[str, Any]:
    """What the file beside the weights must know about this architecture's attention."""
    layer = attention_layers(model)[0]
    how: dict[str, Any] = {
        "cache_argument": layer.cache_argument,
        "cache_position": layer.cache_position,
        "names": ["k_proj", "v_proj"],
    }
    projections = layer.projections
    if isinstance(projections, FusedProjection):
        how |= {
            "names": [projections.name],
            "groups": projections.groups,
            "query_rows": projections.query_rows,
            "kv_rows": projections.kv_rows,
        }
    return how


def _map_files(model_class: str, config_class: str) -> dict[str, str]:
    """The files `exported_model` and `exported_config`, with the classes that they build on."""
    here = resources.files("kvsharer_exp.shipping")
    model = (here / "exported_model.py").read_text(encoding="utf-8")
    config = (here / "exported_config.py").read_text(encoding="utf-8")
    model = model.replace(f"from {CONFIG} import", f"from .{_CONFIG} import")
    return {
        f"{_CODE}.py": with_stock(model, "LlamaForCausalLM", model_class),
        f"{_CONFIG}.py": with_stock(config, "LlamaConfig", config_class),
    }


def _name_as_export(path: Path) -> None:
    """Give the stock model's config.json the model type and the architecture of an export."""
    held = json.loads(path.read_text(encoding="utf-8"))
    held["model_type"] = TYPE_PREFIX + held["model_type"].removeprefix(TYPE_PREFIX)
    held["architectures"] = [own_architecture(name) for name in held["architectures"]]
    path.write_text(json.dumps(held, indent=2, sort_keys=True) + "\n", encoding="utf-8")
