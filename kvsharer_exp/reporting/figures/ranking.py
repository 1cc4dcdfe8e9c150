"""Draw the ranking: distances between layers, and what the acceptance test made of its order.

Every command that ranks keeps the heat map; ``search`` keeps the other picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvsharer_exp.reporting.figures.style import BLUE, GREY, ORANGE, empty
from kvsharer_exp.values.greedy import GreedyResult


def distance_heatmap(distances: Sequence[Sequence[float]], title: str) -> Any:
    """Draw the distance of every pair that may share; the fields of other pairs stay white.

    ``distances`` is ``[target][source]``: targets go down, sources across.
    """
    figure, axes = empty(6.2, 5.4)
    image = axes.imshow(distances, cmap="cividis", interpolation="nearest")
    axes.set(title=title, xlabel="source layer (its KV is read)", ylabel="target layer (reads it)")
    step = max(1, len(distances) // 10)
    axes.set_xticks(range(0, len(distances), step))
    axes.set_yticks(range(0, len(distances), step))
    figure.colorbar(image, ax=axes, label="distance", shrink=0.85)
    return figure


def acceptance_figure(result: GreedyResult, *, threshold: float) -> Any:
    """Draw the cosine of every pair tested, in the order tried; a line marks the threshold."""
    figure, axes = empty()
    tried = [(i, step) for i, step in enumerate(result.trace, 1) if step.cosine is not None]
    for accepted, colour, marker in ((True, BLUE, "o"), (False, ORANGE, "x")):
        chosen = [(i, step.cosine) for i, step in tried if step.accepted is accepted]
        word = "accepted" if accepted else "refused"
        label = f"{word} ({len(chosen)})"
        xs, ys = [i for i, _ in chosen], [cosine for _, cosine in chosen]
        axes.scatter(xs, ys, s=22, c=colour, marker=marker, alpha=0.8, label=label)
    axes.axhline(threshold, color=GREY, linestyle="--", label=f"T = {threshold:g}")
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
