"""Make the tables of an ablation: arms with intervals and marks, and acceptance by rank.

The command ``ablate`` prints them, with sentences on how far its items can tell arms apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from kvsharer_exp.reporting.ablation import MARKS, Cell
from kvsharer_exp.search.paper.acceptance import RankBin
from kvsharer_exp.search.paper.arms import PLAN_ARMS
from kvsharer_exp.values.intervals import Interval, half_width
from kvsharer_exp.values.score_names import HELD_OUT_KL, ScoreName, label, table_columns

LEGEND = (
    "▲ better, ▼ worse than the first arm, ≈ not told apart: paired on the same items, adjusted "
    "for the number of comparisons (Holm); no mark: not as many layers shared, or no items"
)

PLANS_LEGEND = (
    "KV: the share of the full cache's bytes that is kept, at footprint.context. Arms of plans "
    "keep no more bytes than read does at the same ratio, but for those named map_ and _alone. "
    "Their column shared counts layers without KV of their own; where most layers keep some of "
    "it, it repeats that of read or of the map. No plan: none of the arm keeps so few bytes"
)


def arms_table(
    cells: Sequence[Cell], full: Mapping[str, float], intervals: Mapping[str, Interval]
) -> list[list[str]]:
    """Header and rows: the full cache first, then every arm at every ratio.

    Each task has a column of its own, with an interval and a mark (see `LEGEND`). If an arm chose
    plans, a column says what is kept (see `PLANS_LEGEND`).
    """
    kept = any(cell.arm in PLAN_ARMS for cell in cells)
    shown = [name for name in (HELD_OUT_KL, *table_columns(full)) if name in full]
    kept_name, kept_full = (["KV"], ["100.0%"]) if kept else ([], [])
    rows = [["arm", "ratio", "shared", *kept_name, "evaluated", "seconds", *map(label, shown)]]
    none = Interval(0.0, 0.0, 0.0)  # the KL of the full cache to itself
    whole = [none if name == HELD_OUT_KL else intervals.get(name) for name in shown]
    scored = [_number(interval) for interval in whole]
    rows.append(["full cache", "", "0", *kept_full, "", "", *scored])
    for cell in cells:
        scores = [
            _number(cell.scores.get(name), MARKS.get(cell.verdicts.get(name, ""), ""))
            for name in shown
        ]
        low, high = min(cell.found), max(cell.found)
        found = f"{low if low == high else f'{low}–{high}'}/{cell.requested}"
        share = f"{cell.kv_fraction:.1%}"
        if cell.has_no_plan:
            found, share = "no plan", "–"
        draws = f" (mean of {len(cell.found)})" if len(cell.found) > 1 else ""
        rows.append(
            [
                cell.label + draws,
                f"{cell.compression:.1%}",
                found,
                *([share] if kept else []),
                f"{cell.evaluated:.0f}",
                f"{cell.seconds:.1f}",
                *scores,
            ]
        )
    return rows


def _number(interval: Interval | None, mark: str = "") -> str:
    if interval is None:
        return "–"
    mean, low, high = (0.0 if abs(x) < 1e-6 else x for x in asdict(interval).values())
    inside = "" if low == high else f" ({low:.3g}–{high:.3g})"
    return f"{mean:.3g}{inside} {mark}".rstrip()


def acceptance_table(bins: Mapping[str, Sequence[RankBin]]) -> list[list[str]]:
    """Header and rows: ranks down, arms across; a cell is ``accepted/tried (interval)``."""
    rows = [["rank", *[arm.replace("_", " ") for arm in bins]]]
    for across in zip(*bins.values(), strict=True):
        cells = [
            "–"
            if b.rate is None
            else f"{b.accepted}/{b.tried} ({b.rate.low:.0%}–{b.rate.high:.0%})"
            for b in across
        ]
        first, last = across[0].first, across[0].last
        rows.append([f"{first}–{last}" if first < last else f"{first}", *cells])
    return rows


def limit_sentences(items: Mapping[str, Sequence[float]], *, confidence: float) -> list[str]:
    """Say how wide the interval of each task is with its items, and with 4 and 16 times as many."""
    sentences = []
    for name in table_columns(items):
        values = items[name]
        if len(values) < 2 or not ScoreName.parse(name).is_task:
            continue
        widths = [
            f"± {half_width(values, size, confidence=confidence):.2g} with {size}"
            for size in (len(values) * factor for factor in (1, 4, 16))
        ]
        sentences.append(f"The limit: {label(name)} {', '.join(widths)} items")
    return sentences


def untested_sentences(items: Mapping[str, Sequence[float]]) -> list[str]:
    """One sentence for every score without a value for each item, as F1 is: no test compares it."""
    return [
        f"No test for {label(name)}: its value is of all items together, not of each"
        for name in table_columns(items)
        if not items[name]
    ]
