"""Pictures: each one function from values to a figure; nothing is written here.

Colours are Okabe and Ito's (told apart by colour-blind readers and in print).
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvsharer_exp.records import GreedyResult, TrialResult

_BLUE, _ORANGE, _GREEN, _GREY, _BLACK = "#0072B2", "#D55E00", "#009E73", "#9A9A9A", "#000000"
_MARKERS = "s^vP"


def _figure(width: float = 7.0, height: float = 4.4) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # object-oriented: no pyplot, no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_png(figure: Any) -> bytes:
    """The figure as PNG, the same bytes every time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def distance_heatmap(distances: Sequence[Sequence[float]], title: str) -> Any:
    """Distance of every pair that may share: target down, source across; others stay white."""
    figure, axes = _figure(6.2, 5.4)
    image = axes.imshow(distances, cmap="cividis", interpolation="nearest")
    axes.set(title=title, xlabel="source layer (its KV is read)", ylabel="target layer (reads it)")
    step = max(1, len(distances) // 10)
    axes.set_xticks(range(0, len(distances), step))
    axes.set_yticks(range(0, len(distances), step))
    figure.colorbar(image, ax=axes, label="distance", shrink=0.85)
    return figure


def acceptance_figure(result: GreedyResult, *, threshold: float) -> Any:
    """Cosine of every pair tried, in the order tried; the line is the threshold."""
    figure, axes = _figure()
    tried = [(i, step) for i, step in enumerate(result.trace, 1) if step.cosine is not None]
    for accepted, colour, marker in ((True, _BLUE, "o"), (False, _ORANGE, "x")):
        chosen = [(i, step.cosine) for i, step in tried if step.accepted is accepted]
        word = "accepted" if accepted else "refused"
        label = f"{word} ({len(chosen)})"
        xs, ys = [i for i, _ in chosen], [cosine for _, cosine in chosen]
        axes.scatter(xs, ys, s=22, c=colour, marker=marker, alpha=0.8, label=label)
    axes.axhline(threshold, color=_GREY, linestyle="--", label=f"T = {threshold:g}")
    axes.set(
        xlabel="pair, in the order tried", ylabel="cosine to the full model's last hidden state"
    )
    axes.set_title(f"Greedy: {result.found} of {result.requested} layers found")
    if not tried:
        axes.text(
            0.5,
            0.5,
            "no acceptance test was run",
            ha="center",
            va="bottom",
            transform=axes.transAxes,
        )
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def front_figure(
    results: Sequence[TrialResult],
    front: Sequence[TrialResult],
    *,
    reference_maps: Mapping[str, Sequence[TrialResult]],
    score_label: str,
    title: str,
    full_score: float | None = None,
) -> Any:
    """Score against KV kept; the front as steps with its sizes: the best map for every budget.

    Scores that are minus a loss (kl, perplexity, cosine) are drawn as the loss, on a log scale;
    linear below the smallest loss where one is 0. ``full_score``: of the full cache, drawn when
    given.
    """
    figure, axes = _figure(7.4, 5.0)
    losses = _are_losses(results)

    def scatter(points: list[tuple[float, float, int]], label: str, **style: Any) -> None:
        axes.scatter([p[0] for p in points], [p[1] for p in points], label=label, **style)

    points = _points(results, losses)
    scatter(points, "maps scored", s=14, c=_GREY, alpha=0.6, zorder=1)
    for (name, chosen), marker in zip(reference_maps.items(), _MARKERS * 9, strict=False):
        scatter(_points(chosen, losses), name, s=48, c=_ORANGE, marker=marker, zorder=2)
    line = _points(front, losses)
    xs, ys = [p[0] for p in line], [p[1] for p in line]
    axes.plot(xs, ys, "o-", c=_BLUE, label="front", drawstyle="steps-pre", zorder=3)
    for fraction, height, shared in line:
        # Below a loss or above a score: the side where no map is.
        place = {"xytext": (0, -13 if losses else 6), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(str(shared), (fraction, height), color=_BLUE, ha="center", **place)
    heights = [p[1] for p in points]
    if full_score is not None:
        full = (1.0, _height(full_score, losses), 0)
        scatter([full], "full cache", s=110, c=_BLACK, marker="*", zorder=4)
        heights.append(full[1])
    if losses:
        _log_scale(axes, heights)
    axes.invert_xaxis()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set(xlabel="KV cache kept (numbers: layers shared)", title=title)
    axes.set_ylabel(_label(score_label, losses))
    axes.grid(axis="y", alpha=0.25)
    axes.margins(y=0.08)
    axes.legend(frameon=False, loc="upper left" if losses else "lower left")
    return figure


def _log_scale(axes: Any, heights: Sequence[float]) -> None:
    """Log, or linear between 0 and the smallest positive height where some are 0."""
    positive = [height for height in heights if height > 0]
    if len(positive) == len(heights):
        axes.set_yscale("log")
    elif positive:
        axes.set_yscale("symlog", linthresh=min(positive), linscale=0.4)


def _are_losses(results: Sequence[TrialResult]) -> bool:
    scores = [result.score for result in results if result.score is not None]
    return any(score < 0 for score in scores) and max(scores) <= 0


def _label(score_label: str, losses: bool) -> str:
    return f"−{score_label}, lower is better" if losses else f"{score_label}, higher is better"


def _height(score: float, losses: bool) -> float:
    return max(0.0, -score) if losses else score


def _points(results: Sequence[TrialResult], losses: bool) -> list[tuple[float, float, int]]:
    """(kv_fraction, height, layers shared), most KV first."""
    points = [
        (r.footprint.kv_fraction, _height(r.score, losses), len(r.sharing_map.targets))
        for r in results
        if r.score is not None and math.isfinite(r.score)
    ]
    return sorted(points, reverse=True)


def hypervolume_figure(volumes: Sequence[float]) -> Any:
    """Hypervolume of the front after every map scored."""
    figure, axes = _figure(7.0, 3.6)
    axes.step(range(1, len(volumes) + 1), volumes, where="post", color=_GREEN)
    axes.set(xlabel="maps scored", ylabel="hypervolume", title="Search progress")
    axes.grid(alpha=0.25)
    return figure


def front_html(
    results: Sequence[TrialResult],
    front: Sequence[TrialResult],
    *,
    reference_maps: Mapping[str, Sequence[TrialResult]],
    score_label: str,
    title: str,
    full_score: float | None = None,
) -> str:
    """The front as an interactive figure, a ``<div>`` with its library inside (no network).

    Plotly's log axis has no place for 0: a loss of 0 is drawn below the smallest other one.
    """
    from plotly.graph_objects import Figure, Scatter

    losses = _are_losses(results)
    positive = [height for _, height, _ in _points(results, losses) if height > 0]
    floor = min(positive, default=1.0) / 2

    def place(score: float) -> float:
        return max(floor, _height(score, losses)) if losses else score

    def trace(name: str, chosen: Sequence[TrialResult], **style: Any) -> Any:
        kept = [r for r in chosen if r.score is not None and math.isfinite(r.score)]
        kept.sort(key=lambda r: -r.footprint.kv_fraction)
        return Scatter(
            name=html.escape(name),
            x=[r.footprint.kv_fraction for r in kept],
            y=[place(r.score) for r in kept if r.score is not None],
            text=[_hover(r) for r in kept],
            hovertemplate="%{text}<extra></extra>",
            **style,
        )

    other = {"mode": "markers", "marker": {"color": _ORANGE, "size": 10, "symbol": "square"}}
    scored = {"mode": "markers", "marker": {"color": _GREY, "size": 6}}
    line = {
        "mode": "lines+markers",
        "marker": {"color": _BLUE, "size": 9},
        "line": {"color": _BLUE, "shape": "vh"},
    }
    traces = [
        trace("maps scored", results, **scored),
        *[trace(name, chosen, **other) for name, chosen in reference_maps.items()],
        trace("front", front, **line),
    ]
    if full_score is not None:
        star = {"color": _BLACK, "size": 13, "symbol": "star"}
        text = f"full cache<br>score: {full_score:.4g}<extra></extra>"
        full = {"x": [1.0], "y": [place(full_score)], "mode": "markers", "hovertemplate": text}
        traces.append(Scatter(name="full cache", marker=star, **full))
    figure = Figure(traces)
    figure.update_layout(template="plotly_white", title=html.escape(title), height=520)
    figure.update_xaxes(title="KV cache kept", tickformat=".0%", autorange="reversed")
    figure.update_yaxes(
        title=html.escape(_label(score_label, losses)), type="log" if losses else "linear"
    )
    return figure.to_html(full_html=False, include_plotlyjs=True, div_id="front")


def _hover(result: TrialResult) -> str:
    """Size, origin, map (in lines of 12 layers) and scores; plotly reads it as HTML."""
    shared = f"{len(result.sharing_map.targets)}/{result.sharing_map.num_layers} shared"
    sources = [str(source) for source in result.sharing_map.kv_source_layers]
    rows = ["_".join(sources[start : start + 12]) for start in range(0, len(sources), 12)]
    scores = [f"{html.escape(name)}: {value:.4g}" for name, value in result.scores.items()]
    head = f"{shared} · {html.escape(result.origin)}"
    return "<br>".join([head, "_<br>".join(rows), *scores])
