"""Share KV for good: ``model = make_shared(model, sharing_map)``.

``export`` makes the model that it writes this way, and `load_exported` the model that it returns.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TypeVar

from torch import nn

from kvsharer_exp.model.sharing.architectures import attention_layers, check_map
from kvsharer_exp.model.sharing.exchange import EachThread
from kvsharer_exp.model.sharing.hooks import connect
from kvsharer_exp.model.sharing.projections import QueryRows
from kvsharer_exp.model.sharing.runtime import refuse_if_sharing
from kvsharer_exp.values.sharing_map import SharingMap

Model = TypeVar("Model", bound=nn.Module)


def make_shared(model: Model, sharing_map: SharingMap) -> Model:
    """Change ``model`` itself to run under ``sharing_map``, without the weights it no longer needs.

    The hooks and stubs are those of `share_kv`, but there is no way back. The key and value weights
    of targets leave ``state_dict`` and may be freed; of a fused projection the query rows stay. The
    model gets ``config.kv_source_layers`` (list, one source per layer, transformers' name) and
    ``parameter_bytes_saved`` (int, exactly what `footprint` predicts). Any number of threads may
    run the model, and a deep copy of it is independent. It may be trained, also with gradient
    checkpointing as transformers does it; only the query rows of a fused projection are frozen.

    Returns:
        ``model``.

    Raises:
        SharingError: the map does not fit, the model cannot share, or it is already sharing.
    """
    layers = attention_layers(model)
    check_map(sharing_map, layers)
    refuse_if_sharing(layers)
    saved = sum(layers[target].kv_parameter_bytes for target in sharing_map.targets)
    with ExitStack() as undo:
        connect(layers, [sharing_map], EachThread(), undo)
        for layer in layers:
            for stub in layer.attention.children():
                if isinstance(stub, QueryRows):
                    stub.own()
        undo.pop_all()  # no error: forget how to undo, and with it the dropped weights
    model.config.kv_source_layers = list(sharing_map.kv_source_layers)  # type: ignore[union-attr]
    model.parameter_bytes_saved = saved  # type: ignore[assignment]
    return model
