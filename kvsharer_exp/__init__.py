"""Find, test and ship KV plans for pretrained language models: what each layer does about its KV.

>>> from kvsharer_exp import KVPlan, apply_plan, load_model
>>> model, tokenizer = load_model("tiny")
>>> with apply_plan(model, KVPlan.parse("0_1q4_2_0_x_5")):
...     ids = model.generate(**tokenizer("The sea", return_tensors="pt"), max_new_tokens=4)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsharer_exp.measure.fits import fit_plan as fit_plan
    from kvsharer_exp.model.fitted_plan import FittedPlan as FittedPlan
    from kvsharer_exp.model.load import load_model as load_model
    from kvsharer_exp.model.sharing.permanent import make_plan as make_plan
    from kvsharer_exp.model.sharing.permanent import make_shared as make_shared
    from kvsharer_exp.model.sharing.runtime import apply_plan as apply_plan
    from kvsharer_exp.model.sharing.runtime import share_kv as share_kv
    from kvsharer_exp.shipping.export import load_exported as load_exported
    from kvsharer_exp.tracking.run_plans import load_plan as load_plan
    from kvsharer_exp.values.plan import KVPlan as KVPlan
    from kvsharer_exp.values.sharing_map import SharingMap as SharingMap

__version__ = "0.1.0"

# Imported at first use: torch and transformers cost seconds that `--help` should not pay.
_PUBLIC = {
    "FittedPlan": "kvsharer_exp.model.fitted_plan",
    "KVPlan": "kvsharer_exp.values.plan",
    "SharingMap": "kvsharer_exp.values.sharing_map",
    "apply_plan": "kvsharer_exp.model.sharing.runtime",
    "fit_plan": "kvsharer_exp.measure.fits",
    "load_exported": "kvsharer_exp.shipping.export",
    "load_model": "kvsharer_exp.model.load",
    "load_plan": "kvsharer_exp.tracking.run_plans",
    "make_plan": "kvsharer_exp.model.sharing.permanent",
    "make_shared": "kvsharer_exp.model.sharing.permanent",
    "share_kv": "kvsharer_exp.model.sharing.runtime",
}
__all__ = [
    "FittedPlan",
    "KVPlan",
    "SharingMap",
    "apply_plan",
    "fit_plan",
    "load_exported",
    "load_model",
    "load_plan",
    "make_plan",
    "make_shared",
    "share_kv",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
