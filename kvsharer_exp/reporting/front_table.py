"""Make the table of a front, which the terminal, the page and the files of a sweep show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from kvsharer_exp.reporting.plan_kinds import action_counts, kv_percent
from kvsharer_exp.reporting.sharing_front import holds_plans
from kvsharer_exp.values.score_names import ScoreName, label, table_columns
from kvsharer_exp.values.trial import FrontEntry

Ends = Mapping[str, Sequence[float]]
"""By score name, the two ends of an interval."""

NONE: Ends = MappingProxyType({})


def front_table(
    entries: Sequence[FrontEntry], full_scores: Mapping[str, float], full_intervals: Ends = NONE
) -> list[list[str]]:
    """Header and rows: the full cache first, then every other entry.

    The first column counts shared layers. If an entry is a plan that is no map, it counts the
    layers that do each action. The score of a task is followed by its 95 % interval, if it is
    known, and any other score by the percentage of the full cache's score that is retained.
    """
    shown = table_columns(full_scores)
    plans = holds_plans(entries)
    rows = [["layers" if plans else "shared", "KV", *map(label, shown), "from"]]
    full = [number(full_scores[name]) + (_inside(name, full_intervals) or "") for name in shown]
    rows.append(["full cache" if plans else "0 (full)", "100%", *full, ""])
    for entry in entries:
        if entry.is_full:
            continue
        cells = []
        for name in shown:
            kept, value = entry.retained.get(name), entry.scores.get(name)
            share = f" ({kept:.0%})" if kept is not None else ""
            inside = _inside(name, entry.intervals)
            cells.append("–" if value is None else number(value) + (inside or share))
        size = action_counts(entry.kv_plan)
        size = size if plans else size.removesuffix(" shared")
        rows.append([size, kv_percent(entry.kv_fraction, fine=plans), *cells, entry.origin])
    return rows


def _inside(name: str, intervals: Ends) -> str | None:
    """The interval of a task's score, as it follows the score."""
    if name not in intervals or not ScoreName.parse(name).is_task:
        return None
    low, high = intervals[name]
    return f" ({number(low)}–{number(high)})"


def table_notes(
    entries: Sequence[FrontEntry], full_scores: Mapping[str, float], full_intervals: Ends = NONE
) -> list[str]:
    """What a reader has to know of the tasks in the table of a front; see `task_notes`."""
    others = [(e.scores, e.retained) for e in entries if not e.is_full]
    return task_notes(others, full_scores, full_intervals)


def task_notes(
    others: Sequence[tuple[Mapping[str, float], Mapping[str, float]]],
    full_scores: Mapping[str, float],
    full_intervals: Ends = NONE,
) -> list[str]:
    """Say which tasks cannot tell plans from the full cache, and which the full cache fails.

    ``others``: the scores of each plan, and what it retains of the full cache's. Every score of
    which no plan retains a share is named, also where a table shows another score of the task.
    """
    shown = table_columns(full_scores)
    silent, failed = [], []
    for name in (name for name in full_scores if ScoreName.parse(name).is_task):
        found = [scores[name] for scores, _ in others if name in scores]
        low, high = full_intervals.get(name, (1.0, 0.0))
        if name in shown and found and all(low <= score <= high for score in found):
            silent.append(label(name))
        if found and not any(name in kept for _, kept in others):
            failed.append(f"{label(name)} ({number(full_scores[name])})")
    notes = []
    if silent:
        notes.append(
            f"Cannot tell these from the full cache: {', '.join(silent)}; every score lies in the "
            "interval of the full cache's, more items would narrow it (scoring.report.limit)"
        )
    if failed:
        notes.append(
            f"The full cache fails {', '.join(failed)}, so nothing is retained there: it answers "
            "fewer than half of the questions, or no more of them than guessing may"
        )
    return notes


def number(value: float, digits: int = 3) -> str:
    """``value`` with so many digits; the rounding noise of a zero is written as zero."""
    return "0" if abs(value) < 1e-6 else f"{value:.{digits}g}"
