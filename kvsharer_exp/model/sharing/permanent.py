"""Run a model under a plan for good: ``model = make_plan(model, plan)``; of a map: `make_shared`.

``export`` makes the model that it writes this way, and `load_exported` the model that it returns.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TypeVar

from torch import nn

from kvsharer_exp.model.actions.check import check_plan
from kvsharer_exp.model.actions.sizes import parameter_bytes_saved
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.connect import connect
from kvsharer_exp.model.sharing.exchange import EachThread
from kvsharer_exp.model.sharing.projections import QueryRows
from kvsharer_exp.model.sharing.runtime import refuse_if_sharing
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap

Model = TypeVar("Model", bound=nn.Module)


def make_shared(model: Model, sharing_map: SharingMap) -> Model:
    """Change ``model`` itself to run under ``sharing_map``, as `make_plan`.

    The model gets ``config.kv_source_layers`` (list, one source per layer, transformers' name).

    Returns:
        ``model``.

    Raises:
        SharingError: the map does not fit, the model cannot share, or it is already sharing.
    """
    return make_plan(model, KVPlan.of(sharing_map))


def make_plan(model: Model, plan: FittedPlan | KVPlan) -> Model:
    """Change ``model`` itself to run under ``plan``, without the weights it no longer needs.

    The hooks and stubs are those of `apply_plan`, but there is no way back. The key and value
    weights of targets and the attentions of stand-ins leave ``state_dict`` and may be freed; of a
    fused projection the query rows stay. The model gets ``parameter_bytes_saved`` (int, exactly
    what `footprint` predicts) and ``config.kv_source_layers`` of a map or else ``config.kv_plan``
    (the plan's text). Any number of threads may run the model, and a deep copy of it is
    independent. It may be trained where no layer is quantised, also with gradient checkpointing as
    transformers does it; only the query rows of a fused projection are frozen.

    Returns:
        ``model``.

    Raises:
        SharingError: the plan does not fit, or the model cannot share or already runs under a plan.
        InputError: the plan has stand-ins without fits; make them with ``fit_plan``.
    """
    layers = attention_layers(model)
    fitted = FittedPlan.of(plan)
    check_plan(fitted, layers)
    refuse_if_sharing(layers)
    saved = parameter_bytes_saved(fitted.plan, layers)
    with ExitStack() as undo:
        connect(layers, [fitted], EachThread(), undo)
        for layer in layers:
            for stub in layer.attention.children():
                if isinstance(stub, QueryRows):
                    stub.own()
        undo.pop_all()  # no error: forget how to undo, and with it the dropped weights
    sharing_map = fitted.plan.sharing_map
    if sharing_map is not None:
        model.config.kv_source_layers = list(sharing_map.kv_source_layers)  # type: ignore[union-attr]
    else:
        model.config.kv_plan = str(fitted.plan)  # type: ignore[union-attr]
    model.parameter_bytes_saved = saved  # type: ignore[assignment]
    return model
