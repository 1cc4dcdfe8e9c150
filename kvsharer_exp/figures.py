"""Pictures: each one function from values to a figure; nothing is written here.

Colours are Okabe and Ito's (told apart by colour-blind readers and in print).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from kvsharer_exp.records import GreedyResult, TrialResult

_BLUE, _ORANGE, _GREEN, _GREY, _BLACK = "#0072B2", "#D55E00", "#009E73", "#9A9A9A", "#000000"


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
        axes.scatter(xs, ys, c=colour, marker=marker, label=label)
    axes.axhline(threshold, color=_GREY, linestyle="--", label=f"T = {threshold:g}")
    axes.set(
        xlabel="pair, in the order tried", ylabel="cosine to the full model's last hidden state"
    )
    axes.set_title(f"Greedy: {result.found} of {result.requested} layers found")
    axes.legend(frameon=False)
    return figure


def front_figure(
    results: Sequence[TrialResult],
    front: Sequence[TrialResult],
    *,
    reference_maps: Mapping[str, Sequence[TrialResult]],
    score_label: str,
    title: str,
) -> Any:
    """Score against KV kept; the front as a line with its sizes.

    Scores that are minus a loss (kl, perplexity, cosine) are drawn as the loss, on a log scale.
    """
    figure, axes = _figure(7.4, 5.0)
    losses = _are_losses(results)
    points = _points(results, losses)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    axes.scatter(xs, ys, s=14, c=_GREY, alpha=0.6, label="maps scored", zorder=1)
    for (name, chosen), marker in zip(reference_maps.items(), "s^vP", strict=False):
        known = _points(chosen, losses)
        xs, ys = [p[0] for p in known], [p[1] for p in known]
        axes.scatter(xs, ys, s=48, c=_ORANGE, marker=marker, label=name, zorder=2)
    line = _points(front, losses)
    xs, ys = [p[0] for p in line], [p[1] for p in line]
    axes.plot(xs, ys, "o-", c=_BLUE, label="front", zorder=3)
    for fraction, loss, shared in line:
        place = {"xytext": (0, -13), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        axes.annotate(str(shared), (fraction, loss), color=_BLUE, **place)
    if losses:
        axes.set_yscale("log")
    axes.invert_xaxis()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set(xlabel="KV cache kept (numbers: layers shared)", title=title)
    axes.set_ylabel(_label(score_label, losses))
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, loc="upper left")
    return figure


def _are_losses(results: Sequence[TrialResult]) -> bool:
    scores = [result.score for result in results if result.score is not None]
    return any(score < 0 for score in scores) and max(scores) <= 0


def _label(score_label: str, losses: bool) -> str:
    return f"−{score_label}" if losses else score_label


def _points(results: Sequence[TrialResult], losses: bool) -> list[tuple[float, float, int]]:
    """(kv_fraction, height, layers shared), most KV first; a log axis has no place for 0."""
    points = [
        (r.footprint.kv_fraction, -r.score if losses else r.score, len(r.sharing_map.targets))
        for r in results
        if r.score is not None and not (losses and r.score > -1e-9)
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
) -> str:
    """The front as an interactive figure, a ``<div>`` with its library inside (no network)."""
    from plotly.graph_objects import Figure, Scatter

    losses = _are_losses(results)

    def trace(name: str, chosen: Sequence[TrialResult], **style: Any) -> Any:
        kept = [r for r in chosen if r.score is not None and not (losses and r.score > -1e-9)]
        kept.sort(key=lambda r: -r.footprint.kv_fraction)
        return Scatter(
            name=name,
            x=[r.footprint.kv_fraction for r in kept],
            y=[-r.score if losses and r.score is not None else r.score for r in kept],
            text=[_hover(r) for r in kept],
            hovertemplate="%{text}<extra></extra>",
            **style,
        )

    styles = {"mode": "markers", "marker": {"color": _ORANGE, "size": 10, "symbol": "square"}}
    scored = {"mode": "markers", "marker": {"color": _GREY, "size": 6}}
    line = {"mode": "lines+markers", "marker": {"color": _BLUE, "size": 9}}
    figure = Figure(
        [
            trace("maps scored", results, **scored),
            *[trace(name, chosen, **styles) for name, chosen in reference_maps.items()],
            trace("front", front, **line),
        ]
    )
    figure.update_layout(template="plotly_white", title=title, height=520)
    figure.update_xaxes(title="KV cache kept", tickformat=".0%", autorange="reversed")
    figure.update_yaxes(title=_label(score_label, losses), type="log" if losses else "linear")
    return figure.to_html(full_html=False, include_plotlyjs=True, div_id="front")


def _hover(result: TrialResult) -> str:
    scores = "<br>".join(f"{name}: {value:.4g}" for name, value in result.scores.items())
    shared = f"{len(result.sharing_map.targets)}/{result.sharing_map.num_layers} shared"
    return f"{shared} · {result.origin}<br>{result.sharing_map}<br>{scores}"
