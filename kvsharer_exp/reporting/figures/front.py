"""Draw the front of memory against accuracy, for print and as an interactive figure.

The page of a sweep shows the interactive figure. The other is kept as PNG and PDF.

Scores that are minus a loss (kl, perplexity, cosine) are drawn as the loss, on a log scale. If a
loss is 0, the scale of the printed figure is linear below the smallest other loss.

If some results are plans that do more than sharing, sharing maps are told apart from them: they are
green, and the front of the maps only is drawn beside the front of all plans.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvsharer_exp.reporting.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    empty,
    log_scale,
)
from kvsharer_exp.reporting.plan_kinds import kv_percent, size_words
from kvsharer_exp.reporting.sharing_front import holds_plans, maps_among, plans_among, sharing_front
from kvsharer_exp.values.trial import TrialResult

_PLANS, _MAPS = "plans scored", "maps scored"
_FRONT, _ALL, _ONLY_MAPS = "front", "front of all plans", "front of sharing maps only"

Intervals = Mapping[str, tuple[float, float]]
"""By a map's digest, the two ends between which its score may lie, in units of the score."""


def front_figure(
    results: Sequence[TrialResult],
    front: Sequence[TrialResult],
    *,
    reference_maps: Mapping[str, Sequence[TrialResult]],
    score_label: str,
    title: str,
    full_score: float | None = None,
    intervals: Intervals | None = None,
) -> Any:
    """Draw score against KV kept, with the front as steps that show the best map for every budget.

    The numbers on the front are numbers of shared layers. If there are plans that are no maps, only
    the front of the maps has such numbers.

    Args:
        reference_maps: maps to mark, by the name of the method that chose them.
        score_label: names what is drawn.
        full_score: the score of the full cache; drawn when given.
        intervals: drawn as bars on the front and the reference maps.
    """
    figure, axes = empty(7.4, 5.0)
    losses = are_losses(results)

    def scatter(points: list[tuple[float, float, int]], label: str, **style: Any) -> None:
        if points:  # or the legend would name what is not drawn
            axes.scatter([p[0] for p in points], [p[1] for p in points], label=label, **style)

    plans, only_maps = holds_plans(results), sharing_front(results)
    points = _points(results, losses)
    if plans:
        dots = _points(plans_among(results), losses)
        scatter(dots, _PLANS, s=14, c=GREY, alpha=0.6, zorder=1)
        scatter(_points(maps_among(results), losses), _MAPS, s=14, c=GREEN, alpha=0.4, zorder=1)
    else:
        scatter(points, _MAPS, s=14, c=GREY, alpha=0.6, zorder=1)
    for (name, chosen), marker in zip(reference_maps.items(), MARKERS * 9, strict=False):
        scatter(_points(chosen, losses), name, s=48, c=ORANGE, marker=marker, zorder=2)
        _draw_intervals(axes, chosen, intervals or {}, losses, ORANGE)
    line = _points(front, losses)
    xs, ys = [p[0] for p in line], [p[1] for p in line]
    name = _ALL if plans else _FRONT
    axes.plot(xs, ys, "o-", c=BLUE, label=name, drawstyle="steps-pre", zorder=3)
    _draw_intervals(axes, front, intervals or {}, losses, BLUE)
    if only_maps:
        maps = _points(only_maps, losses)
        style = {"drawstyle": "steps-pre", "zorder": 2.5, "markersize": 4.5}
        axes.plot([p[0] for p in maps], [p[1] for p in maps], "s--", c=GREEN, label=_ONLY_MAPS,
                  **style)  # fmt: skip
        _number(axes, [point for point in maps if point[2]], GREEN, below=not losses, halo=True)
    elif not plans:
        # The number goes below a loss and above a score, the side where no map is.
        _number(axes, line, BLUE, below=losses)
    heights = [p[1] for p in points]
    if full_score is not None:
        full = (1.0, height_of(full_score, losses), 0)
        scatter([full], "full cache", s=110, c=BLACK, marker="*", zorder=4)
        heights.append(full[1])
    if losses:
        log_scale(axes, heights)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    numbers = "" if plans and not only_maps else " (numbers: layers shared)"
    axes.set(xlabel=f"KV cache kept{numbers}", title=title)
    axes.set_ylabel(score_axis(score_label, losses))
    axes.grid(axis="y", alpha=0.25)
    axes.margins(y=0.08)
    # Below the axes, because the points of some runs leave no corner free.
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _number(
    axes: Any,
    points: Sequence[tuple[float, float, int]],
    colour: str,
    *,
    below: bool,
    halo: bool = False,
) -> None:
    """Write the number of shared layers below or above each point.

    ``halo`` puts white around each number, where dots may lie behind it.
    """
    from matplotlib.patheffects import withStroke

    more = {"path_effects": [withStroke(linewidth=2, foreground="white")]} if halo else {}
    place = {"xytext": (0, -13 if below else 6), "textcoords": "offset points", "fontsize": 8}
    for fraction, height, shared in points:
        axes.annotate(str(shared), (fraction, height), color=colour, ha="center", **place, **more)


def _draw_intervals(
    axes: Any, chosen: Sequence[TrialResult], intervals: Intervals, losses: bool, colour: str
) -> None:
    for result in chosen:
        if result.score is not None and result.plan.digest in intervals:
            ends = [height_of(end, losses) for end in intervals[result.plan.digest]]
            fraction = result.footprint.kv_fraction
            axes.vlines(fraction, min(ends), max(ends), color=colour, lw=5, alpha=0.3, zorder=1.5)


def are_losses(results: Sequence[TrialResult]) -> bool:
    """Whether the scores are minus a loss: none is above 0, and some are below."""
    scores = [result.score for result in results if result.score is not None]
    return any(score < 0 for score in scores) and max(scores) <= 0


def height_of(score: float, losses: bool) -> float:
    """The height at which a score is drawn: the score itself, or the loss."""
    return max(0.0, -score) if losses else score


def score_axis(score_label: str, losses: bool) -> str:
    """The label of the score axis, which says whether lower or higher is better."""
    return f"{score_label} ({'lower' if losses else 'higher'} is better)"


def _points(results: Sequence[TrialResult], losses: bool) -> list[tuple[float, float, int]]:
    """(kv_fraction, height, layers shared), most KV first."""
    points = [
        (r.footprint.kv_fraction, height_of(r.score, losses), len(r.plan.targets))
        for r in results
        if r.score is not None and math.isfinite(r.score)
    ]
    return sorted(points, reverse=True)


def front_html(
    results: Sequence[TrialResult],
    front: Sequence[TrialResult],
    *,
    reference_maps: Mapping[str, Sequence[TrialResult]],
    score_label: str,
    title: str,
    full_score: float | None = None,
    intervals: Intervals | None = None,
) -> str:
    """Draw what `front_figure` draws as an interactive ``<div>``, which needs no network.

    Plotly's library is inside it. Plotly's log axis has no place for 0, so a loss of 0 is drawn
    below the smallest other loss.
    """
    from plotly.graph_objects import Figure, Scatter

    losses, plans, only_maps = are_losses(results), holds_plans(results), sharing_front(results)
    positive = [height for _, height, _ in _points(results, losses) if height > 0]
    floor = min(positive, default=1.0) / 2

    def place(score: float) -> float:
        return max(floor, height_of(score, losses)) if losses else score

    def bars(chosen: Sequence[TrialResult]) -> dict[str, Any]:
        """The error bars: how far each interval reaches above and below its point."""
        reach = []
        for result in chosen:
            assert result.score is not None
            here = (result.score, result.score)
            ends = [place(end) for end in (intervals or {}).get(result.plan.digest, here)]
            reach.append((max(ends) - place(result.score), place(result.score) - min(ends)))
        sides = {"array": [up for up, _ in reach], "arrayminus": [down for _, down in reach]}
        return {"error_y": {"type": "data", **sides}} if intervals else {}

    def trace(name: str, chosen: Sequence[TrialResult], sure: bool = True, **style: Any) -> Any:
        kept = [r for r in chosen if r.score is not None and math.isfinite(r.score)]
        kept.sort(key=lambda r: -r.footprint.kv_fraction)
        return Scatter(
            name=html.escape(name),
            x=[r.footprint.kv_fraction for r in kept],
            y=[place(r.score) for r in kept if r.score is not None],
            text=[_hover(r, plans) for r in kept],
            hovertemplate="%{text}<extra></extra>",
            **({} if sure else bars(kept)),
            **style,
        )

    other: dict[str, Any] = {
        "mode": "markers",
        "marker": {"color": ORANGE, "size": 10, "symbol": "square"},
    }
    scored: dict[str, Any] = {"mode": "markers", "marker": {"color": GREY, "size": 6}}
    line: dict[str, Any] = {
        "mode": "lines+markers",
        "marker": {"color": BLUE, "size": 9},
        "line": {"color": BLUE, "shape": "vh"},
    }
    name = _PLANS if plans else _MAPS
    traces = [trace(name, plans_among(results) if plans else results, **scored)]
    if plans:
        dots: dict[str, Any] = {"mode": "markers", "marker": {"color": GREEN, "size": 6}}
        traces.append(trace(_MAPS, maps_among(results), **dots))
    traces += [trace(name, chosen, False, **other) for name, chosen in reference_maps.items()]
    if only_maps:
        dashed = {"color": GREEN, "shape": "vh", "dash": "dash"}
        squares = {"color": GREEN, "size": 8, "symbol": "square"}
        traces.append(
            trace(_ONLY_MAPS, only_maps, mode="lines+markers", marker=squares, line=dashed)
        )
    traces.append(trace(_ALL if plans else _FRONT, front, False, **line))
    if full_score is not None:
        star = {"color": BLACK, "size": 13, "symbol": "star"}
        text = f"full cache<br>score: {full_score:.4g}<extra></extra>"
        full = {"x": [1.0], "y": [place(full_score)], "mode": "markers", "hovertemplate": text}
        traces.append(Scatter(name="full cache", marker=star, **full))
    figure = Figure([trace for trace in traces if trace.x])
    figure.update_layout(template="plotly_white", title=html.escape(title), height=520)
    figure.update_xaxes(title="KV cache kept", tickformat=".0%")
    figure.update_yaxes(
        title=html.escape(score_axis(score_label, losses)), type="log" if losses else "linear"
    )
    return figure.to_html(full_html=False, include_plotlyjs=True, div_id="front")


def _hover(result: TrialResult, plans: bool) -> str:
    """The size, origin, plan (in lines of 12 layers) and scores of a point, in HTML for plotly.

    ``plans``: whether some results are plans that are no maps, so that the KV is told too.
    """
    kept = f" · {kv_percent(result.footprint.kv_fraction, fine=True)} KV" if plans else ""
    texts = list(map(html.escape, result.plan.texts))
    rows = ["_".join(texts[start : start + 12]) for start in range(0, len(texts), 12)]
    scores = [f"{html.escape(name)}: {value:.4g}" for name, value in result.scores.items()]
    head = f"{html.escape(size_words(result.plan))}{kept} · {html.escape(result.origin)}"
    return "<br>".join([head, "_<br>".join(rows), *scores])
