"""Draw the pictures of an ablation: arms side by side, acceptance by rank, pairs, thresholds.

The command ``ablate`` keeps each of them as a PNG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvsharer_exp.reporting.ablation import Cell
from kvsharer_exp.reporting.ablation_fronts import Fronts
from kvsharer_exp.reporting.figures.style import BLACK, CYCLE, GREY, empty, log_scale
from kvsharer_exp.search.paper.acceptance import PairScore, RankBin
from kvsharer_exp.values.intervals import Interval
from kvsharer_exp.values.score_names import COSINE, KL, ScoreName

_COLOURS, _MARKERS = (*CYCLE, BLACK), "os^vDPX*<>"  # 7 and 10: no two of 70 arms look alike
_LEGEND = {"frameon": False, "loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": 8}


def _style(index: int) -> dict[str, Any]:
    colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
    return {"color": colour, "marker": marker, "markersize": 5}


def _log(axes: Any) -> None:
    """Give ``axes`` a log scale with plain numbers, also where it spans less than a decade."""
    from matplotlib.ticker import LogFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


def _errors(intervals: Sequence[Interval]) -> tuple[list[float], list[list[float]]]:
    means = [interval.mean for interval in intervals]
    below = [max(0.0, i.mean - i.low) for i in intervals]
    above = [max(0.0, i.high - i.mean) for i in intervals]
    return means, [below, above]


def arms_figure(
    cells: Sequence[Cell], score: str, *, title: str, full_score: float | None = None
) -> Any:
    """Draw ``score`` of every arm at every ratio with its interval, the arms side by side.

    A marker is hollow where an arm found fewer layers than it was asked for. ``full_score`` is that
    of the full cache and becomes a line.
    """
    figure, axes = empty(7.4, 4.6)
    ratios = sorted({cell.compression for cell in cells})
    labels = list(dict.fromkeys(cell.label for cell in cells))
    for index, label in enumerate(labels):
        shown = [cell for cell in cells if cell.label == label and score in cell.scores]
        shift = 0.7 * ((index + 0.5) / len(labels) - 0.5)
        style = _style(index)
        for number, cell in enumerate(shown):
            means, errors = _errors([cell.scores[score]])
            axes.errorbar(
                [ratios.index(cell.compression) + shift],
                means,
                yerr=errors,
                capsize=3,
                linestyle="none",
                markerfacecolor="white" if min(cell.found) < cell.requested else style["color"],
                label="_" if number else label,
                **style,
            )
    if full_score is not None:
        axes.axhline(full_score, color=GREY, linestyle="--", label="full cache")
    if ScoreName.parse(score).kind in ("perplexity", KL):
        _log(axes)
    axes.set_xticks(range(len(ratios)), [f"{ratio:.1%}" for ratio in ratios])
    axes.set(xlabel="compression asked for (hollow: fewer layers found)", ylabel=score, title=title)
    axes.legend(**_LEGEND)
    return figure


def fronts_figure(fronts: Fronts, *, title: str) -> Any:
    """Draw the points (KV fraction, KL) of every arm, least KV first; a panel for each setting."""
    from matplotlib.ticker import MaxNLocator

    figure, panels = empty(3.9 * len(fronts) + 2.0, 4.2, panels=len(fronts))
    panels = panels if len(fronts) > 1 else [panels]
    names = list(dict.fromkeys(arm for arms in fronts.values() for arm in arms))
    for axes, (setting, arms) in zip(panels, fronts.items(), strict=True):
        for index, name in enumerate(names):
            points = sorted(arms.get(name, ()))
            kept, kls = [point[0] for point in points], [point[1] for point in points]
            axes.plot(kept, kls, label=name.replace("_", " "), linewidth=1.2, **_style(index))
        axes.set_xscale("log", base=2)
        low, high = axes.get_xlim()
        if high < 4 * low:  # with ticks at powers of two, two of them at most
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        log_scale(axes, [kl for points in arms.values() for _, kl in points])
        axes.set(xlabel="share of the full cache's bytes", title=setting)
    panels[0].set_ylabel("KL to the full cache, nats")
    panels[-1].legend(**_LEGEND)
    figure.suptitle(title)
    return figure


def acceptance_rank_figure(bins: Mapping[str, Sequence[RankBin]], *, title: str) -> Any:
    """Draw the share of tested pairs that passed, by rank, for each arm; bars are intervals."""
    figure, axes = empty(7.4, 4.6)
    for index, (label, across) in enumerate(bins.items()):
        known = [(b, b.rate) for b in across if b.rate is not None]
        means, errors = _errors([rate for _, rate in known])
        middles = [(b.first + b.last) / 2 for b, _ in known]
        tried = sum(b.tried for b in across)
        label = f"{label.replace('_', ' ')} ({tried} tried)"
        axes.errorbar(middles, means, yerr=errors, capsize=3, label=label, **_style(index))
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set(xlabel="rank of the pair (1: most dissimilar)", ylabel="accepted", title=title)
    axes.legend(**_LEGEND)
    return figure


def pairs_figure(pairs: Sequence[PairScore], *, threshold: float, title: str) -> Any:
    """Draw cosine and KL (nats) of every pair shared alone, by rank, coloured by target layer.

    ``threshold`` is that of the cosine and becomes a line.
    """
    figure, (left, right) = empty(9.6, 4.4, panels=2)
    ranks, targets = [pair.rank for pair in pairs], [pair.target for pair in pairs]
    for axes, name in ((left, COSINE), (right, KL)):
        heights = [getattr(pair, name) for pair in pairs]
        dots = axes.scatter(ranks, heights, c=targets, s=14, cmap="cividis")
        axes.set_xlabel("rank of the pair (1: most dissimilar)")
    left.axhline(threshold, color=GREY, linestyle="--", label=f"T = {threshold:g}")
    left.legend(frameon=False, loc="best")
    left.set(ylabel="cosine to the full model's last hidden state", title=title)
    if all(pair.kl > 0 for pair in pairs):
        _log(right)
    right.set_ylabel("KL, nats")
    figure.colorbar(dots, ax=right, label="target layer")
    return figure


def threshold_figure(
    points: Mapping[float, Sequence[Cell]], score: str, *, title: str, full_score: float
) -> Any:
    """Draw, over the threshold T, how many layers were shared, and ``score`` of those maps.

    ``points`` holds the cells by T. There is one curve per compression ratio, whose label says how
    many layers were asked for.
    """
    figure, (left, right) = empty(9.6, 4.4, panels=2)
    thresholds = sorted(points)
    ratios = sorted({cell.compression for cells in points.values() for cell in cells})
    for index, ratio in enumerate(ratios):
        chosen = [
            (threshold, cell)
            for threshold in thresholds
            for cell in points[threshold]
            if cell.compression == ratio
        ]
        style, label = _style(index), f"{ratio:.1%} ({chosen[0][1].requested} layers)"
        left.plot([t for t, _ in chosen], [c.found[0] for _, c in chosen], label=label, **style)
        scored = [(t, c.scores[score]) for t, c in chosen if score in c.scores]
        means, errors = _errors([interval for _, interval in scored])
        right.errorbar([t for t, _ in scored], means, yerr=errors, capsize=3, label=label, **style)
    right.axhline(full_score, color=GREY, linestyle="--", label="full cache")
    if ScoreName.parse(score).kind in ("perplexity", KL):
        _log(right)
    left.yaxis.get_major_locator().set_params(integer=True)
    right.set_xlim(left.get_xlim())
    left.set(xlabel="threshold T", ylabel="layers shared", title=title)
    right.set(xlabel="threshold T", ylabel=score)
    right.legend(**_LEGEND)
    return figure
