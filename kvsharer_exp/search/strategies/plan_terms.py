"""What the loss of a plan adds up from: what each layer does instead of keeping its KV in 16 bits.

`Memory` makes the terms of a `LossModel` here for a space of plans. The block error of every
candidate is known beforehand. What it does not tell is alike for the actions of one layer, and for
one kind of action in neighbouring layers: a stand-in may cost more than its block error says where
a 4-bit owner does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvsharer_exp.search.candidates import Candidate
from kvsharer_exp.search.strategies.loss_model import CENTRE_SD, Terms, alike, with_errors
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.drop import Drop
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.plan import KVPlan

# Standard deviations of what log block errors do not tell of log losses: by layer, by kind of
# action, by both, and by candidate.
_LAYER, _KIND, _BOTH, _EACH = 0.4, 0.4, 0.3, 0.1
_REMEMBERED = 20_000  # plans whose terms are kept


def action_terms(at: Sequence[Sequence[Candidate]]) -> Terms:
    """The terms of the candidates ``at`` each layer, but for 16 bits, which cost nothing."""
    listed = [c for of_layer in at for c in of_layer if c.action != Own()]
    index = {(c.layer, c.action): i for i, c in enumerate(listed)}
    layers = np.array([c.layer for c in listed])
    kinds = np.array([_kind(c.action) for c in listed])
    same_kind = kinds[:, None] == kinds
    near = alike(layers)
    covariance = _LAYER**2 * near + _KIND**2 * same_kind + _BOTH**2 * near * same_kind
    covariance += _EACH**2 * np.eye(len(listed)) + CENTRE_SD**2
    covariance, expected = with_errors(covariance, [c.error for c in listed])
    codes: dict[Action, int] = {Own(): 0}
    known: dict[tuple[str, ...], list[int]] = {}  # each plan is asked for in every fit

    def of(plan: KVPlan) -> list[int]:
        if plan.texts not in known:
            if len(known) >= _REMEMBERED:
                known.clear()
            known[plan.texts] = terms(plan)
        return known[plan.texts]

    def terms(plan: KVPlan) -> list[int]:
        found = []
        for layer, action in enumerate(plan.actions):
            place = index.get((layer, action))
            source = action.keys_from(layer)
            if place is None and source not in (None, layer):  # a source that is no candidate
                place = index.get((layer, Drop()))
            if place is not None:
                found.append(place)
            if source not in (None, layer):  # what it reads may be quantised
                bits = index.get((layer, plan.actions[source]))
                found += [] if bits is None else [bits]
        return found

    return Terms(
        list(index),
        covariance,
        expected,
        True,
        of=of,
        size=lambda plan: max(1, plan.num_layers - len(plan.owners)),
        codes=lambda plan: [codes.setdefault(action, len(codes)) for action in plan.actions],
        full=KVPlan.full(len(at)),
    )


def _kind(action: Action) -> str:
    return f"own {action.bits}" if isinstance(action, Own) else action.name
