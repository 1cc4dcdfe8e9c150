"""Write what ``bench engine=vllm`` measured as a table: a row for each plan under each load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def num_rows(sides: Mapping[str, Any]) -> int:
    """The rows of each cell in `engine_table`: one for each plan."""
    return len(sides)


def engine_table(
    sides: Mapping[str, Mapping[str, Any]], cells: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """Header and rows: blocks, requests that fit, medians, and ratios to the full cache.

    ``sides`` says of each plan by name what the engine made of its memory, and each of ``cells``
    what was measured of it under one load and context.
    """
    rows = [["load×ctx", "plan", "blocks", "fit", "tokens/s", "× full", "ms/token", "× full"]]
    for cell in cells:
        where = f"{cell['load']}×{cell['context']}"
        for name, side in sides.items():
            got = cell[name]
            ratios = got["ratios"]
            is_first = name == next(iter(sides))
            rows.append(
                [
                    where if is_first else "",
                    "full" if is_first else side["words"],
                    str(side["num_blocks"]),
                    str(got["requests_that_fit"]),
                    f"{got['tokens_per_second']['median']:.1f}",
                    "" if is_first else _ratio(ratios["tokens_per_second"]),
                    f"{1000 * got['token_seconds']['median']:.1f}",
                    "" if is_first else _ratio(ratios["token_seconds"]),
                ]
            )
    return rows


def _ratio(inside: Mapping[str, float]) -> str:
    return f"{inside['mean']:.3f} ({inside['low']:.3f}–{inside['high']:.3f})"
