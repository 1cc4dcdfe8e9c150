"""Where a model computes, also where its weights wait elsewhere until a layer runs."""

from __future__ import annotations

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """The device on which ``module`` computes.

    It is that of its weights. Weights that accelerate offloads are on the ``meta`` device until the
    module runs, and its hook says where that will be.
    """
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook holds several
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    held = next(module.parameters(), None)
    return torch.device("cpu") if held is None or held.is_meta else held.device


def input_device(model: nn.Module) -> torch.device:
    """The device to which token ids for ``model`` belong."""
    return device_of(model.get_input_embeddings())  # type: ignore[operator]
