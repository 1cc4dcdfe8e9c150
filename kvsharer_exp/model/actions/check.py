"""Tells whether a plan fits a model."""

from __future__ import annotations

from kvsharer_exp.model.actions.registry import runner_of
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.sharing.architectures import AttentionLayer
from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap


def check_plan(plan: KVPlan | SharingMap | FittedPlan, layers: tuple[AttentionLayer, ...]) -> None:
    """Refuse a plan, or a map, that does not fit the model of ``layers``.

    Raises:
        SharingError: the numbers of layers differ, a layer cannot do its action, or a fit is one of
            another model. The message then names the layer.
    """
    fits = plan.fits if isinstance(plan, FittedPlan) else {}
    plan = plan.plan if isinstance(plan, FittedPlan) else KVPlan.of(plan)
    if plan.num_layers != len(layers):
        kind, rule = ("plan", "action") if plan.sharing_map is None else ("map", "source")
        raise SharingError(
            f"{kind} has {plan.num_layers} layers but the model has {len(layers)}: "
            f"give one {rule} per layer, or the model that it is for"
        )
    for layer, action in zip(layers, plan.actions, strict=True):
        runner_of(action).check(layer, layers)
        if action.fitted and layer.index in fits:
            runner_of(action).check_fit(layer, fits[layer.index])
