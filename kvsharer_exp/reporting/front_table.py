"""Make the table of a front, which the terminal, the page and the files of a sweep show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvsharer_exp.reporting.plan_kinds import kv_percent, size_words
from kvsharer_exp.reporting.sharing_front import holds_plans
from kvsharer_exp.values.score_names import label, table_columns
from kvsharer_exp.values.trial import FrontEntry


def front_table(entries: Sequence[FrontEntry], full_scores: Mapping[str, float]) -> list[list[str]]:
    """Header and rows: the full cache first, then every other entry.

    The first column counts shared layers. If an entry is a plan that is no map, it says in words
    what the layers do. A score is followed by the percentage of the full cache's score that is
    retained.
    """
    shown = table_columns(full_scores)
    plans = holds_plans(entries)
    rows = [["layers" if plans else "shared", "KV", *map(label, shown), "from"]]
    full = [number(full_scores[name]) for name in shown]
    rows.append(["full cache" if plans else "0 (full)", "100%", *full, ""])
    for entry in entries:
        if entry.is_full:
            continue
        cells = []
        for name in shown:
            kept = entry.retained.get(name)
            share = f" ({kept:.0%})" if kept is not None else ""
            value = entry.scores.get(name)
            cells.append("–" if value is None else number(value) + share)
        size = size_words(entry.kv_plan)
        size = size if plans else size.removesuffix(" shared")
        rows.append([size, kv_percent(entry.kv_fraction, fine=plans), *cells, entry.origin])
    return rows


def number(value: float) -> str:
    """``value`` with three digits; the rounding noise of a zero is written as zero."""
    return "0" if abs(value) < 1e-6 else f"{value:.3g}"
