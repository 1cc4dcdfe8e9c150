"""Print the front of a ``sweep`` on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from kvsharer_exp.cli.terminal import TurningTable
from kvsharer_exp.reporting.front_table import front_table
from kvsharer_exp.values.trial import FrontEntry


def print_front(
    console: Any, entries: Sequence[FrontEntry], full_scores: Mapping[str, float]
) -> None:
    """Print the front as a table, then every map on a line to copy, which is never wrapped."""
    header, *rows = front_table(entries, full_scores)
    table = TurningTable(*header[:-1])  # the origin of a map is on its line below
    for row in rows:
        table.add_row(*row[:-1])
    console.print(table)
    for entry in entries:
        if entry.num_shared:
            text = "_".join(map(str, entry.kv_source_layers))
            line = Text(f"{entry.num_shared:3d} shared  {text}  {entry.origin}")
            console.print(line, soft_wrap=True)
