"""Say how a plan of the front is served: which engines run it, and the lines to copy.

The page of a sweep shows this. What it says of vLLM is what `vllm_support` lists, and the tests of
``tests/engine/`` prove.
"""

from __future__ import annotations

import html

from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.actions.read_kv import ReadKV
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.vllm_support import FAMILIES, cannot

_PROMPT = 'inputs = tokenizer("The capital of France is", return_tensors="pt")'
_PRINT = "    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"


def engines(plan: SharingMap | KVPlan, architecture: str = "") -> list[str]:
    """Name the engines that run the plan on a model of this ``architecture``.

    transformers runs all; layers that are quantised or let tokens go, and keys and values of two
    layers, need this package too. vLLM runs the actions and the architectures of `vllm_support`.
    """
    plan = KVPlan.of(plan)
    able = architecture in FAMILIES and not any(map(cannot, plan.actions))
    ours = "transformers with this package" if needs_package(plan) else "transformers"
    return [ours, *(["vLLM"] if able else [])]


def needs_package(plan: KVPlan) -> bool:
    """Whether a layer is quantised, lets tokens go, or reads keys and values of two layers."""
    return any(
        isinstance(action, ReadKV)
        or (isinstance(action, Own) and (action.quantised or action.bounded))
        for action in plan.actions
    )


def serving(model: str, plan: KVPlan, size: str, architecture: str = "") -> str:
    """Lines to copy for ``plan`` of ``model``, as HTML; ``size`` says what it does, in words."""
    is_map = plan.sharing_map is not None
    lines = _map_lines(model, plan, size) if is_map else _plan_lines(model, plan, size)
    folder = "shared_model" if is_map else "plan_model"
    if "vLLM" not in engines(plan, architecture):
        return lines + "<p>vLLM does not run this plan on this model.</p>"
    serve = html.escape(f"kvsharer serve serve.folder={folder} --check")
    return f"""{lines}
<p>In vLLM, first checked against the folder, token by token:</p>
<pre>{serve}</pre>"""


def _map_lines(model: str, plan: KVPlan, size: str) -> str:
    code = f"""from kvsharer_exp import SharingMap, load_model, share_kv

model, tokenizer = load_model({model!r})
sharing_map = SharingMap.parse("{plan}")
{_PROMPT}
with share_kv(model, sharing_map):
{_PRINT}"""
    shell = f"kvsharer export model={model} map={plan} export.path=shared_model"
    load = """from kvsharer_exp import load_exported

model, tokenizer = load_exported("shared_model")"""
    blocks = [f"<pre>{html.escape(text)}</pre>" for text in (code, shell, load)]
    return f"""<p>{html.escape(size)}, in Python:</p>
{blocks[0]}<p>As a model folder without the weights that targets no longer need:</p>
{blocks[1]}{blocks[2]}"""


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
{blocks[1]}{blocks[2]}"""
