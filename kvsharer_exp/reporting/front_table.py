"""Make the table of a front, which the terminal, the page and the files of a sweep show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvsharer_exp.values.score_names import label, table_columns
from kvsharer_exp.values.trial import FrontEntry


def front_table(entries: Sequence[FrontEntry], full_scores: Mapping[str, float]) -> list[list[str]]:
    """Header and rows: the full cache first, then every map that shares a layer.

    A score is followed by the percentage of the full cache's score that the map retains.
    """
    shown = table_columns(full_scores)
    rows = [["shared", "KV", *map(label, shown), "from"]]
    full = [number(full_scores[name]) for name in shown]
    rows.append(["0 (full)", "100%", *full, ""])
    for entry in entries:
        if not entry.num_shared:
            continue
        cells = []
        for name in shown:
            kept = entry.retained.get(name)
            share = f" ({kept:.0%})" if kept is not None else ""
            value = entry.scores.get(name)
            cells.append("–" if value is None else number(value) + share)
        size = f"{entry.num_shared}/{len(entry.kv_source_layers)}"
        rows.append([size, f"{entry.kv_fraction:.0%}", *cells, entry.origin])
    return rows


def number(value: float) -> str:
    """``value`` with three digits; the rounding noise of a zero is written as zero."""
    return "0" if abs(value) < 1e-6 else f"{value:.3g}"
