"""Draw how a search went: hypervolume, and the best map of every size, over the maps scored.

The size of a map is its number of shared layers. If there are plans that are no maps, the best plan
of every budget is drawn instead: a share of the full cache's KV.

The page of a sweep shows this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvsharer_exp.reporting.figures.front import are_losses, height_of, score_axis
from kvsharer_exp.reporting.figures.style import GREEN, empty, log_scale, shades, spread
from kvsharer_exp.reporting.sharing_front import holds_plans
from kvsharer_exp.search.front import kv_of
from kvsharer_exp.values.trial import TrialResult

_LINES = 8
_BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)  # shares of the full cache's KV

Lines = dict[float, list[tuple[int, float]]]
"""By the size or budget of a line, its points: (results by then, the best score so far)."""


def progress_figure(
    results: Sequence[TrialResult], volumes: Sequence[float], *, score_label: str
) -> Any:
    """Draw the hypervolume of the front after every map scored.

    Beside it is the best score so far, for up to eight sizes or budgets.
    """
    plans = holds_plans(results)
    scored = "plans scored" if plans else "maps scored"
    figure, (left, right) = empty(9.6, 3.8, panels=2)
    left.step(range(1, len(volumes) + 1), volumes, where="post", color=GREEN)
    left.set(xlabel=scored, ylabel="hypervolume", title="Front")
    losses = are_losses(results)
    lines = _best_in_budgets(results) if plans else _best_lines(results)
    sizes = spread(sorted(lines), _LINES)
    heights = []
    for size, colour in zip(sizes, shades(len(sizes)), strict=True):
        xs = [number for number, _ in lines[size]]
        ys = [height_of(score, losses) for _, score in lines[size]]
        heights += ys
        style = {
            "drawstyle": "steps-post",
            "color": colour,
            "label": f"{size:.0%}" if plans else str(size),
        }
        right.plot([*xs, len(results)], [*ys, ys[-1]], **style)
    if losses and heights:
        log_scale(right, heights)
    title = (
        "Best plan within a share of the KV" if plans else "Best map per number of shared layers"
    )
    right.set(xlabel=scored, title=title)
    right.set_ylabel(score_axis(score_label, losses))
    for axes in (left, right):
        axes.grid(alpha=0.25)
    if sizes:
        place = {
            "loc": "center left",
            "bbox_to_anchor": (1, 0.5),
            "title": "KV at\nmost" if plans else "layers\nshared",
        }
        right.legend(frameon=False, fontsize=8, title_fontsize=8, reverse=True, **place)
    return figure


def _best_lines(results: Sequence[TrialResult]) -> Lines:
    """By number of shared layers, a point (maps scored by then, score) for every improvement."""
    lines: Lines = {}
    for number, result in enumerate(results, 1):
        if result.score is None:
            continue
        line = lines.setdefault(len(result.plan.targets), [])
        if not line or result.score > line[-1][1]:
            line.append((number, result.score))
    return lines


def _best_in_budgets(results: Sequence[TrialResult]) -> Lines:
    """The same by budget: the best of the plans that keep at most this share of the KV."""
    lines: Lines = {}
    for number, result in enumerate(results, 1):
        if result.score is None:
            continue
        for budget in _BUDGETS:
            if kv_of(result) <= budget + 1e-9:
                line = lines.setdefault(budget, [])
                if not line or result.score > line[-1][1]:
                    line.append((number, result.score))
    return lines
