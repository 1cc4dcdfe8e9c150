"""The plan of least loss in which a given number of layers keep no KV.

An ablation asks for it (`cli.steps.ablation_plans`), to compare ways of doing without a layer's KV.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.choice import Choice
from kvsharer_exp.values.plan import KVPlan


def without_kv(choices: Sequence[Choice], count: int, budget: int) -> KVPlan | None:
    """The plan of least loss with exactly ``count`` layers that own nothing, within ``budget``.

    It is exact. Each layer has a choice that owns its KV, and at most one that does not. Returns
    None if there is no such plan.
    """
    owned = {choice.layer: choice for choice in choices if choice.owns}
    whole = sum(choice.kv_bytes for choice in owned.values())
    # By layers given up and bytes saved: the least loss, and what those layers do. Layers of equal
    # size meet in one state, so there are few.
    best: dict[tuple[int, int], tuple[float, dict[int, Action]]] = {(0, 0): (0.0, {})}
    for choice in (choice for choice in choices if not choice.owns):
        gain = owned[choice.layer].kv_bytes - choice.kv_bytes
        for (number, saved), (loss, actions) in list(best.items()):
            key, total = (number + 1, saved + gain), loss + choice.loss
            if number < count and (key not in best or total < best[key][0]):
                best[key] = total, {**actions, choice.layer: choice.action}
    fitting = [
        (loss, actions)
        for (number, saved), (loss, actions) in best.items()
        if number == count and whole - saved <= budget
    ]
    if not fitting:
        return None
    _, actions = min(fitting, key=lambda state: state[0])
    return KVPlan(tuple(actions.get(i, owned[i].action) for i in sorted(owned)))
