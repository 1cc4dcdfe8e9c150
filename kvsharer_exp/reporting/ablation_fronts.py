"""The fronts of the arms of an ablation that choose plans, by the area that each covers.

A table has a row for every ratio, and says which arm is best at one size. The area says how an arm
does over all sizes. The command ``ablate`` prints it, and draws the fronts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvsharer_exp.reporting.ablation import Cell, settings_words
from kvsharer_exp.search.fitness import FITNESSES
from kvsharer_exp.search.front import Point, hypervolume
from kvsharer_exp.search.paper.arms import JOINT, PLAN_ARMS
from kvsharer_exp.values.score_names import HELD_OUT_KL, KL

Fronts = Mapping[str, Mapping[str, Sequence[Point]]]
"""By setting in words and by arm of plans, the points (KV fraction, held-out KL)."""

Areas = Mapping[str, Mapping[str, float]]
"""By setting in words and by arm the area of a front."""

AREAS_LEGEND = (
    "area: what a front covers of the rectangle between no KV at no loss (1) and the full cache's "
    f"bytes at a KL of {FITNESSES[KL].reference:g} (0), on held-out text; the joint front holds "
    "the plans of the single arms too"
)


def fronts(cells: Sequence[Cell]) -> dict[str, dict[str, list[Point]]]:
    """See `Fronts`; there is one where two arms or more can be compared."""
    found: dict[str, dict[str, list[Point]]] = {}
    for cell in cells:
        if cell.arm in PLAN_ARMS and HELD_OUT_KL in cell.scores:
            arms = found.setdefault(settings_words(cell.variant), {})
            point = (cell.kv_fraction, cell.scores[HELD_OUT_KL].mean)
            arms.setdefault(cell.arm, []).append(point)
    return {setting: arms for setting, arms in found.items() if len(arms) > 1}


def areas(drawn: Fronts) -> dict[str, dict[str, float]]:
    """The area of every front (see `AREAS_LEGEND`)."""
    found: dict[str, dict[str, float]] = {}
    for setting, arms in drawn.items():
        every = [point for points in arms.values() for point in points]
        found[setting] = {
            arm: _area(every if arm == JOINT else points) for arm, points in arms.items()
        }
    return found


def _area(points: Sequence[Point]) -> float:
    worst = FITNESSES[KL].reference
    return hypervolume([(kept, -kl) for kept, kl in points], (1.0, -worst)) / worst


def areas_table(found: Areas) -> list[list[str]]:
    """Header and rows: arms down, settings across."""
    arms = list(dict.fromkeys(arm for by_arm in found.values() for arm in by_arm))
    rows = [["arm", *(f"area {setting}".rstrip() for setting in found)]]
    for arm in arms:
        values = [by_arm.get(arm) for by_arm in found.values()]
        rows.append([arm.replace("_", " "), *("–" if v is None else f"{v:.4f}" for v in values)])
    return rows


def joint_sentences(found: Areas) -> list[str]:
    """Say of each setting by how much the joint front covers more than the best single arm."""
    said = []
    for setting, by_arm in found.items():
        others = {arm: area for arm, area in by_arm.items() if arm != JOINT}
        if JOINT not in by_arm or not others:
            continue
        best = max(others, key=lambda arm: others[arm])
        where, gain = f"at {setting}: " if setting else "", by_arm[JOINT] - others[best]
        said.append(
            f"{where}the joint front covers {by_arm[JOINT]:.4f}, {gain:.4f} more than that of "
            f"{best.replace('_', ' ')}, the best single arm"
        )
    return said
