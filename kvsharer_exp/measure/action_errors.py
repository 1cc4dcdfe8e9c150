"""Measure what each action would do to the output of its layer's block, before any plan is scored.

`fits` chooses between two places of a stand-in by it, and the search is told it (`Choice`). Every
block before the layer sees what it sees in the full model, so an action costs the forward of one
block, as a pair does in `calibration.block_errors`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from kvsharer_exp.measure.batch_size import halving_batches
from kvsharer_exp.measure.calibration import output_of, remember
from kvsharer_exp.model.devices import input_device
from kvsharer_exp.model.fitted_plan import Fit, FittedPlan
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.runtime import install
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.plan import KVPlan

Candidate = tuple[Action, Fit | None]


@torch.inference_mode()
@halving_batches
def action_errors(
    model: nn.Module,
    windows: torch.Tensor,
    candidates: Mapping[int, Sequence[Candidate]],
    *,
    batch_size: int = 8,
    prompt: int | None = None,
) -> dict[int, list[float]]:
    """The block error of each of the ``candidates`` of each layer, alone in the full model.

    That is ‖changed - own‖² / ‖own‖² of the output of the layer's block, mean over the tokens of
    ``windows`` (num_windows, window_tokens), or over those after a ``prompt`` of so many tokens. An
    action that overflows in the model's dtype has an infinite error.
    """
    layers = attention_layers(model)
    full = KVPlan.full(len(layers))
    plans = {
        index: [
            FittedPlan(full.replace(index, action), {} if fit is None else {index: fit})
            for action, fit in actions
        ]
        for index, actions in candidates.items()
    }
    device = input_device(model)
    totals = {index: [0.0] * len(of_layer) for index, of_layer in plans.items()}
    for batch in windows.split(batch_size):
        calls: dict[int, tuple[Any, Any, Any]] = {}
        with ExitStack() as undo:
            for index in plans:
                hook = partial(remember, calls, index)
                block = layers[index].block
                undo.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
            with install(layers, [full], keep=True) as states:
                model.base_model(batch.to(device), use_cache=False)  # type: ignore[operator]
        for index, of_layer in plans.items():
            args, kwargs, returned = calls.pop(index)
            own = output_of(returned)
            for number, plan in enumerate(of_layer):
                handed = {source: states[source] for source in range(index)}
                with install(layers, [plan], handed=handed, keep=True, prompt=prompt):
                    changed = output_of(layers[index].block(*args, **kwargs))
                error = (changed - own).square().sum(-1) / own.square().sum(-1)
                total = error[:, prompt or 0 :].mean(-1).sum().item()
                totals[index][number] += total if math.isfinite(total) else math.inf
    return {i: [total / len(windows) for total in of] for i, of in totals.items()}
