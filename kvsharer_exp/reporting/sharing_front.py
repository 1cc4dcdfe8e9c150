"""Tell sweeps of plans from sweeps of maps, and find the front that sharing alone would reach.

A sweep of plans also scores sharing maps. What the other actions add is seen where the front of all
plans is drawn beside the front of the maps only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvsharer_exp.reporting.plan_kinds import is_map
from kvsharer_exp.search.front import is_beaten, pareto_front
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.trial import FrontEntry, TrialResult


def holds_plans(members: Iterable[TrialResult] | Iterable[FrontEntry]) -> bool:
    """Whether one of ``members`` does more than owning and reading."""
    return any(not is_map(plan_of(member)) for member in members)


def plan_of(member: TrialResult | FrontEntry) -> KVPlan:
    """The plan of a result or of an entry."""
    return member.kv_plan if isinstance(member, FrontEntry) else member.plan


def maps_among(results: Iterable[TrialResult]) -> list[TrialResult]:
    """The results of sharing maps."""
    return [result for result in results if is_map(result.plan)]


def plans_among(results: Iterable[TrialResult]) -> list[TrialResult]:
    """The results of plans that do more than sharing."""
    return [result for result in results if not is_map(result.plan)]


def sharing_front(results: Sequence[TrialResult]) -> list[TrialResult]:
    """The front of the sharing maps only; empty if all ``results`` are maps anyway."""
    return pareto_front(maps_among(results)) if holds_plans(results) else []


def num_beaten(results: Sequence[TrialResult]) -> tuple[int, int]:
    """How many maps of the `sharing_front` a plan beats, and how many maps there are on it."""
    maps = sharing_front(results)
    return sum(is_beaten(result, results) for result in maps), len(maps)
