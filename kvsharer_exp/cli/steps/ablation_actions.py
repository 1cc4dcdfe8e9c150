"""What the layers may do in each arm of an ablation that chooses plans.

`PlanArms` asks for the actions of an arm that solves for the bytes of a map, and for the plan of an
arm that lets go of tokens beside sharing, as the paper's appendix B does.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from kvsharer_exp.search.paper.arms import JOINT
from kvsharer_exp.values.actions.affine import Affine
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.constant import Constant
from kvsharer_exp.values.actions.drop import Drop
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.keeps.base import Keep
from kvsharer_exp.values.keeps.h2o import H2O
from kvsharer_exp.values.keeps.schedule import pyramid
from kvsharer_exp.values.keeps.snapkv import SnapKV
from kvsharer_exp.values.keeps.window import Window
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.precision import FULL

KEPT = 0.8
"""The share of the prompt's tokens that stays where the paper compresses by another 20 %."""
_SHARES = (0.5, 0.25, 0.125, 0.0625)
_SHARES_OF_H2O = (0.49, 0.245, 0.1225, 0.06)  # its sums take bytes too
_BITS = (8, 4, 3, 2)
_SINKS = 4
_OBSERVE = 32  # the last tokens of a prompt, by which SnapKV chooses the others

Schedule = Callable[[Sequence[int]], dict[int, Keep]]


def _uniform(layers: Sequence[int]) -> dict[int, Keep]:
    return dict.fromkeys(layers, H2O(KEPT))


def _pyramid(layers: Sequence[int]) -> dict[int, Keep]:
    return dict(pyramid(layers, KEPT))


EVICTING: dict[str, tuple[bool, Schedule]] = {
    "h2o_alone": (False, _uniform),
    "pyramid_alone": (False, _pyramid),
    "map_h2o": (True, _uniform),
    "map_pyramid": (True, _pyramid),
}
"""By arm, whether it is beside the paper's map, and what the owners keep."""


def arm_actions(arm: str, tokens: int) -> tuple[Action, ...]:
    """What the layers of ``arm`` may do instead of keeping all in 16 bits, besides reading.

    Windows, SnapKV and H2O hold numbers of tokens, which are the same shares of ``tokens``.
    """
    without: tuple[Action, ...] = (Drop(), Constant(), Affine())
    quantised = tuple(Own(each, sinks=_SINKS) for each in _BITS)
    windows = tuple(
        Own(keep=Window(_SINKS, max(1, round(share * tokens) - _SINKS + 1))) for share in _SHARES
    )
    snap = tuple(_snap(max(2, round(share * tokens))) for share in _SHARES)
    heavy = tuple(H2O(max(2, round(share * tokens))) for share in _SHARES_OF_H2O)
    of: dict[str, tuple[Action, ...]] = {
        **{action.name: (action,) for action in without},
        "quantised": quantised,
        "windowed": windows,
        "snapkv": tuple(Own(keep=keep) for keep in snap),
        "h2o": tuple(Own(keep=keep) for keep in heavy),
        JOINT: (
            *(*without, *quantised, *windows),
            *(Own(bits, keep=keep) for bits in (FULL, 4) for keep in (*snap, *heavy)),
        ),
    }
    if arm in EVICTING:
        return tuple(Own(keep=keep) for keep in set(EVICTING[arm][1](range(8)).values()))
    return of.get(arm, ())


def _snap(budget: int) -> SnapKV:
    return SnapKV(budget, min(_OBSERVE, budget // 2))


def evicting(arm: str, plan: KVPlan, able: Container[int]) -> KVPlan:
    """``plan``, whose owners among the ``able`` layers keep what the schedule of ``arm`` says."""
    keeps = EVICTING[arm][1]([layer for layer in plan.owners if layer in able])
    return KVPlan(
        tuple(
            Own(keep=keeps[layer]) if layer in keeps else action
            for layer, action in enumerate(plan.actions)
        )
    )
