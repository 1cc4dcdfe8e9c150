"""Finds the layer of a cache that holds what an owner keeps."""

from __future__ import annotations

from kvsharer_exp.model.stores.base import Store
from kvsharer_exp.model.stores.full import FullLayer
from kvsharer_exp.model.stores.heavy import HeavyLayer
from kvsharer_exp.model.stores.packed import PackedLayer
from kvsharer_exp.model.stores.prompted import PromptedLayer
from kvsharer_exp.model.stores.snap import SnapLayer
from kvsharer_exp.model.stores.window import WindowLayer
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.keeps.base import Keep
from kvsharer_exp.values.keeps.h2o import H2O
from kvsharer_exp.values.keeps.snapkv import SnapKV

_PROMPTED: dict[type[Keep], type[PromptedLayer]] = {SnapKV: SnapLayer, H2O: HeavyLayer}


def store_type(action: Own) -> type[Store]:
    """The class of the layer, of whose ``held_bytes`` the predictions are made too."""
    keep = action.keep
    if keep is not None and keep.prompted:
        return _PROMPTED[type(keep)]
    if action.quantised:
        return PackedLayer
    return FullLayer if keep is None else WindowLayer


def make_store(
    action: Own, window: int | None = None, *, lasting: bool = True, prompt: int | None = None
) -> Store:
    """The layer of a cache that holds what ``action`` keeps; see `Store` and `PromptedLayer`."""
    kind = store_type(action)
    if issubclass(kind, PromptedLayer):
        return kind(action, window, lasting=lasting, prompt=prompt)
    return kind(action, window, lasting=lasting)
