"""Draw runs of several models beside the paper's: what is retained, over the layers shared.

The command ``report`` shows these pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvsharer_exp.reporting.figures.style import BLACK, CYCLE, GREY, empty

Curves = Mapping[str, Sequence[tuple[float, float]]]
_MARKERS = "os^vDPX*<>"


def retained_figure(ours: Curves, paper: Curves, *, title: str) -> Any:
    """Draw the curve of every model and map in colour, and the paper's in dashed grey.

    A point of a curve is (share of layers shared, share of the full cache's quality).
    """
    figure, axes = empty(9.4, 4.6)
    axes.axhline(100, color=BLACK, lw=0.8, linestyle=":")
    for index, (label, points) in enumerate(paper.items()):
        marker = _MARKERS[index % len(_MARKERS)]
        axes.plot(
            *_percent(points), color=GREY, linestyle="--", marker=marker, markerfacecolor="white",
            markersize=4, lw=1, label=f"paper: {label}",
        )  # fmt: skip
    for index, (label, points) in enumerate(ours.items()):
        colour, marker = CYCLE[index % len(CYCLE)], _MARKERS[index % len(_MARKERS)]
        axes.plot(*_percent(points), color=colour, marker=marker, markersize=5, label=label)
    axes.set(xlabel="layers shared, %", ylabel="retained of the full cache, %", title=title)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure


def _percent(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [100 * x for x, _ in points], [100 * y for _, y in points]
