"""Fit the stand-ins of a plan on calibration text.

`fit_plan` is the public way. The commands use `fit_actions`, which fits stand-ins of all layers at
once, because one pass over the text serves all. Both never see text that scores are taken on.

The last quarter of the windows is held out: it chooses the ridge of an affine stand-in and, in
blocks with a norm after the attention, whether the stand-in replaces the norm as well: the smaller
block error decides, and `Fit.error` keeps it. In the end a fit has seen all windows, so whoever
compares stand-ins with other actions measures them on other text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from kvsharer_exp.measure.action_errors import action_errors
from kvsharer_exp.measure.moments import HELD_FRACTION, collect_moments, held_windows, plan_passes
from kvsharer_exp.model.actions.check import check_plan
from kvsharer_exp.model.actions.registry import runner_of
from kvsharer_exp.model.branch import ATTENTION, branches_of
from kvsharer_exp.model.fitted_plan import Fit, FittedPlan
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.runtime import install
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.plan import KVPlan

Fits = dict[tuple[int, Action], Fit]
"""By layer and stand-in, its fit."""


def with_fits(plan: KVPlan, fits: Fits) -> FittedPlan:
    """``plan`` with those of ``fits`` that it needs."""
    fitted = [(i, action) for i, action in enumerate(plan.actions) if action.fitted]
    return FittedPlan(plan, {i: fits[i, action] for i, action in fitted})


def fingerprints(fits: Fits) -> dict[str, str]:
    """By layer and stand-in, as text, what identifies the numbers of its fit."""
    return {f"{action.text(i)} of layer {i}": fit.fingerprint for (i, action), fit in fits.items()}


def fit_plan(
    model: nn.Module,
    plan: KVPlan,
    windows: torch.Tensor,
    *,
    sequential: bool = False,
    batch_size: int = 8,
    memory_bytes: int | None = None,
) -> FittedPlan:
    """Fit the stand-ins of ``plan`` on ``windows`` of token ids (num_windows, window_tokens).

    Args:
        sequential: fit one stand-in after the other, each on the hidden states that the plan makes
            before it, instead of all on those of the full model. It takes a forward for each.
        memory_bytes: bounds the sums that are held at a time; a smaller bound takes more passes.

    Raises:
        SharingError: the plan does not fit the model.
        InputError: there are fewer than two windows.
        NotFiniteError: a layer overflows in the model's dtype.
    """
    layers = attention_layers(model)
    check_plan(plan, layers)
    wanted = {i: [action] for i, action in enumerate(plan.actions) if action.fitted}
    options = {"batch_size": batch_size, "memory_bytes": memory_bytes}
    if not sequential:
        fits = fit_actions(model, windows, wanted, **options)  # type: ignore[arg-type]
        return FittedPlan(plan, {layer: fit for (layer, _), fit in fits.items()})
    done: dict[int, Fit] = {}
    for layer in sorted(wanted):
        actions = [Own() if i >= layer and i in wanted else a for i, a in enumerate(plan.actions)]
        so_far = FittedPlan(KVPlan(tuple(actions)), dict(done))
        found = fit_actions(
            model,
            windows,
            {layer: wanted[layer]},
            under=so_far,
            **options,  # type: ignore[arg-type]
        )
        done[layer] = found[layer, plan.actions[layer]]
    return FittedPlan(plan, done)


def fit_actions(
    model: nn.Module,
    windows: torch.Tensor,
    wanted: Mapping[int, Sequence[Action]],
    *,
    under: FittedPlan | None = None,
    batch_size: int = 8,
    memory_bytes: int | None = None,
) -> Fits:
    """Fit each of the ``wanted`` stand-ins, by layer, alone; ``under`` is the plan that runs.

    The other arguments and the errors are those of `fit_plan`.
    """
    layers = attention_layers(model)
    branches = branches_of(layers)
    plans = [FittedPlan(KVPlan.full(len(layers))) if under is None else under]
    hidden = layers[0].hidden_size
    made: dict[int, list[tuple[Action, Fit]]] = {layer: [] for layer in wanted}
    for which in plan_passes(branches, list(wanted), hidden, memory_bytes):
        with install(layers, plans):
            moments = collect_moments(
                model, layers, branches, windows, which=which, batch_size=batch_size
            )
        for (layer, place), parts in moments.items():
            norm = None if place == ATTENTION else branches[layer].norm
            for action in wanted[layer]:
                tensors = runner_of(action).fit(*parts)
                held = {name: tensor.to(layers[layer].dtype) for name, tensor in tensors.items()}
                made[layer].append((action, Fit(held, norm)))
    held_out = windows[-held_windows(len(windows), HELD_FRACTION) :]
    errors = action_errors(model, held_out, made, batch_size=batch_size)
    best: Fits = {}
    for layer, fits in made.items():
        for (action, fit), error in zip(fits, errors[layer], strict=True):
            known = best.get((layer, action))
            if known is None or known.error is None or error < known.error:
                best[layer, action] = Fit(fit.tensors, fit.norm, error)
    return best
