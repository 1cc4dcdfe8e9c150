"""Say how a plan of the front is served: which engines express it, and the lines to copy.

The page of a sweep shows this.
"""

from __future__ import annotations

import html

from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.actions.read_kv import ReadKV
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap

_PROMPT = 'inputs = tokenizer("The capital of France is", return_tensors="pt")'
_PRINT = "    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"


def engines(plan: SharingMap | KVPlan) -> list[str]:
    """Name the engines that can express the plan.

    transformers (with this package) and vLLM let a target of a map read any earlier layer of its
    attention type. SGLang and llama.cpp can only let the last layers read the last owner. What is
    no map is served by transformers. Quantised layers, and keys and values of two layers, need this
    package too.
    """
    plan = KVPlan.of(plan)
    sharing_map = plan.sharing_map
    if sharing_map is None:
        return ["transformers with this package" if needs_package(plan) else "transformers"]
    targets, layers = sharing_map.targets, sharing_map.num_layers
    last_owner = layers - len(targets) - 1
    trailing = all(sharing_map.kv_source_layers[i] == last_owner for i in targets)
    return ["transformers", "vLLM", *(["SGLang", "llama.cpp"] if trailing else [])]


def needs_package(plan: KVPlan) -> bool:
    """Whether a layer is quantised, or reads keys and values of two layers."""
    return any(
        isinstance(action, ReadKV) or (isinstance(action, Own) and action.quantised)
        for action in plan.actions
    )


def serving(model: str, plan: KVPlan, size: str) -> str:
    """Lines to copy for ``plan`` of ``model``, as HTML; ``size`` says what it does, in words."""
    sharing_map = plan.sharing_map
    if sharing_map is not None:
        return _map_lines(model, sharing_map)
    return _plan_lines(model, plan, size)


def _map_lines(model: str, sharing_map: SharingMap) -> str:
    code = f"""from kvsharer_exp import SharingMap, load_model, share_kv

model, tokenizer = load_model({model!r})
sharing_map = SharingMap.parse("{sharing_map}")
{_PROMPT}
with share_kv(model, sharing_map):
{_PRINT}"""
    shell = f"kvsharer export model={model} map={sharing_map} export.path=shared_model"
    load = """from kvsharer_exp import load_exported

model, tokenizer = load_exported("shared_model")"""
    blocks = [f"<pre>{html.escape(text)}</pre>" for text in (code, shell, load)]
    shared = f"{len(sharing_map.targets)} of {sharing_map.num_layers} layers shared"
    return f"""<p>{shared}, in Python:</p>
{blocks[0]}<p>As a model folder without the weights that targets no longer need:</p>
{blocks[1]}{blocks[2]}
<p>vLLM expresses any of these maps: <code>Attention(…, kv_sharing_target_layer_name=…)</code> in
the model's code lets a layer read any earlier one of the same attention type. SGLang and llama.cpp
share trailing layers only: the last layers, reading the last one that keeps its KV.</p>"""


def _plan_lines(model: str, plan: KVPlan, size: str) -> str:
    """As those of a map. The command ``evaluate`` leaves the fits of stand-ins in its folder."""
    fitted = any(action.fitted for action in plan.actions)
    name, value = ("load_plan", "FOLDER") if fitted else ("KVPlan", str(plan))
    call = "load_plan" if fitted else "KVPlan.parse"
    imports = ", ".join(sorted(["apply_plan", "load_model", name], key=lambda n: (n[0] > "Z", n)))
    code = f"""from kvsharer_exp import {imports}

model, tokenizer = load_model({model!r})
plan = {call}("{value}")
{_PROMPT}
with apply_plan(model, plan):
{_PRINT}"""
    export = f"kvsharer export model={model} plan={plan} export.path=plan_model"
    load = """from kvsharer_exp import load_exported

model, tokenizer = load_exported("plan_model")"""
    first = ""
    if fitted:
        evaluate = html.escape(f"kvsharer evaluate model={model} plan={plan}")
        first = f"""<p>Its stand-ins are fitted, or taken from the cache folder, by</p>
<pre>{evaluate}</pre><p>Put the folder of that run, which holds the fits, in place of FOLDER.</p>
"""
    blocks = [f"<pre>{html.escape(text)}</pre>" for text in (code, export, load)]
    return f"""<p>{html.escape(size)}, in Python:</p>
{first}{blocks[0]}<p>As a model folder without the weights that the plan no longer needs:</p>
{blocks[1]}{blocks[2]}
<p>Quantised layers, and layers with keys and values of two others, are served by transformers with
this package only. Plans of reading, dropping and stand-ins (constant, affine) are served by
transformers. vLLM expresses sharing maps only for now.</p>"""
