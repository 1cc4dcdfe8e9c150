"""What each action would cost at each layer, and the plan that is best at such costs.

Whoever measures losses writes them as `Choice` and `ReadChoice`. `kvsharer_exp.search.solver` takes
them and returns `Solved`. The losses of the layers are taken to add up to the loss of a plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.errors import InputError, at_least
from kvsharer_exp.values.plan import KVPlan


@dataclass(frozen=True, slots=True)
class Choice:
    """What ``action`` would cost at ``layer``: an expected ``loss``, and the bytes it keeps.

    The action needs no other layer: it owns its KV, or has no attention. Any unit of loss will do,
    as long as less is better.

    Raises:
        InputError: the action reads another layer, a number is negative, or the loss is no finite
            number. A loss below 0 is allowed.
    """

    layer: int
    action: Action
    loss: float
    kv_bytes: int

    def __post_init__(self) -> None:
        at_least("layer", self.layer, 0)
        at_least("kv_bytes", self.kv_bytes, 0)
        _check_loss(self.layer, self.loss)
        for source in self.sources:
            if source is not None and source != self.layer:
                raise InputError(
                    f"the choice at layer {self.layer} reads layer {source}: give a ReadChoice"
                )

    @property
    def sources(self) -> tuple[int | None, int | None]:
        """The layers whose keys and whose values are read: this one, or None."""
        return self.action.keys_from(self.layer), self.action.values_from(self.layer)

    @property
    def owns(self) -> bool:
        """Whether the layer keeps its keys and values, so that others can read them."""
        return self.sources == (self.layer, self.layer)


@dataclass(frozen=True, slots=True)
class ReadChoice:
    """What it would cost that ``layer`` reads the KV of ``source``, which takes no bytes.

    ``losses`` has the loss for each action by which the source may own its KV. The read is
    forbidden when the source does something else.

    Raises:
        InputError: the source is no earlier layer, or a loss is no finite number.
    """

    layer: int
    source: int
    losses: Mapping[Action, float]

    def __post_init__(self) -> None:
        at_least("source", self.source, 0)
        if self.source >= self.layer:
            raise InputError(f"layer {self.layer} reads layer {self.source}: give an earlier layer")
        for loss in self.losses.values():
            _check_loss(self.layer, loss)


@dataclass(frozen=True, slots=True)
class Solved:
    """A plan with the sum of its layers' losses and of their bytes."""

    plan: KVPlan
    loss: float
    kv_bytes: int

    def gap(self, bound: float) -> float:
        """How far the loss is above a ``bound`` that no plan beats, as a share of the loss."""
        return (self.loss - bound) / self.loss if self.loss > 0 else 0.0


def _check_loss(layer: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise InputError(
            f"layer {layer} has a choice with loss {loss}: leave out what must not be chosen"
        )
