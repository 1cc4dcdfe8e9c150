"""Find, test and ship cross-layer KV-cache sharing maps for pretrained language models.

>>> from kvsharer_exp import SharingMap, load_model, share_kv
>>> model, tokenizer = load_model("smollm2")
>>> with share_kv(model, SharingMap.identity(30).share(7, 0)):
...     ...
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsharer_exp.model.load import load_model as load_model
    from kvsharer_exp.model.sharing.permanent import make_shared as make_shared
    from kvsharer_exp.model.sharing.runtime import share_kv as share_kv
    from kvsharer_exp.shipping.export import load_exported as load_exported
    from kvsharer_exp.values.sharing_map import SharingMap as SharingMap

__version__ = "0.1.0"

# Imported at first use: torch and transformers cost seconds that `--help` should not pay.
_PUBLIC = {
    "SharingMap": "kvsharer_exp.values.sharing_map",
    "load_exported": "kvsharer_exp.shipping.export",
    "load_model": "kvsharer_exp.model.load",
    "make_shared": "kvsharer_exp.model.sharing.permanent",
    "share_kv": "kvsharer_exp.model.sharing.runtime",
}
__all__ = ["SharingMap", "load_exported", "load_model", "make_shared", "share_kv"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
