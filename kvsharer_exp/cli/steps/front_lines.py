"""Print the front of a ``sweep`` on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from kvsharer_exp.cli.terminal import TurningTable
from kvsharer_exp.reporting.front_table import NONE, Ends, front_table, table_notes
from kvsharer_exp.reporting.plan_kinds import kv_percent
from kvsharer_exp.reporting.sharing_front import holds_plans
from kvsharer_exp.values.trial import FrontEntry


def print_front(
    console: Any,
    entries: Sequence[FrontEntry],
    full_scores: Mapping[str, float],
    full_intervals: Ends = NONE,
) -> None:
    """Print the front as a table, then every plan on a line to copy, which is never wrapped.

    A line begins with the number of shared layers. If an entry is a plan that is no map, all lines
    begin with the share of the KV that is kept.
    """
    header, *rows = front_table(entries, full_scores, full_intervals)
    table = TurningTable(*header[:-1])  # the origin of a plan is on its line below
    for row in rows:
        table.add_row(*row[:-1])
    console.print(table)
    for note in table_notes(entries, full_scores, full_intervals):
        console.print(note)
    plans = holds_plans(entries)
    for entry in entries:
        if not entry.is_full:
            kept = kv_percent(entry.kv_fraction, fine=True)
            size = f"{kept:>6s} KV" if plans else f"{entry.num_shared:3d} shared"
            line = Text(f"{size}  {entry.kv_plan}  {entry.origin}")
            console.print(line, soft_wrap=True)
