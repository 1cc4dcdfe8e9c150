"""Draw how a search went: hypervolume, and the best map of every size, over the maps scored.

The page of a sweep shows this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvsharer_exp.reporting.figures.front import are_losses, height_of, score_axis
from kvsharer_exp.reporting.figures.style import GREEN, empty, log_scale, shades, spread
from kvsharer_exp.values.trial import TrialResult

_LINES = 8


def progress_figure(
    results: Sequence[TrialResult], volumes: Sequence[float], *, score_label: str
) -> Any:
    """Draw the hypervolume of the front after every map scored.

    Beside it is the best score so far, for up to eight sizes. A size is a number of shared layers.
    """
    figure, (left, right) = empty(9.6, 3.8, panels=2)
    left.step(range(1, len(volumes) + 1), volumes, where="post", color=GREEN)
    left.set(xlabel="maps scored", ylabel="hypervolume", title="Front")
    losses = are_losses(results)
    lines = _best_lines(results)
    sizes = spread(sorted(lines), _LINES)
    heights = []
    for size, colour in zip(sizes, shades(len(sizes)), strict=True):
        xs = [number for number, _ in lines[size]]
        ys = [height_of(score, losses) for _, score in lines[size]]
        heights += ys
        style = {"drawstyle": "steps-post", "color": colour, "label": str(size)}
        right.plot([*xs, len(results)], [*ys, ys[-1]], **style)
    if losses and heights:
        log_scale(right, heights)
    right.set(xlabel="maps scored", title="Best map per number of shared layers")
    right.set_ylabel(score_axis(score_label, losses))
    for axes in (left, right):
        axes.grid(alpha=0.25)
    if sizes:
        place = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "title": "layers\nshared"}
        right.legend(frameon=False, fontsize=8, title_fontsize=8, reverse=True, **place)
    return figure


def _best_lines(results: Sequence[TrialResult]) -> dict[int, list[tuple[int, float]]]:
    """By size, a point (maps scored by then, score) for every improvement."""
    lines: dict[int, list[tuple[int, float]]] = {}
    for number, result in enumerate(results, 1):
        if result.score is None:
            continue
        line = lines.setdefault(len(result.sharing_map.targets), [])
        if not line or result.score > line[-1][1]:
            line.append((number, result.score))
    return lines
