"""What all pictures share: colours, an empty figure, and how a figure becomes a file.

The other modules of this folder draw with it. The colours are those of Okabe and Ito, which
colour-blind readers can tell apart, also in print. https://jfly.uni-koeln.de/color/
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")

BLUE, ORANGE, GREEN, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#9A9A9A", "#000000"
PURPLE, SKY, YELLOW = "#CC79A7", "#56B4E9", "#E69F00"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW)
MARKERS = "s^vP"
DPI = 150  # the resolution of a PNG


def empty(width: float = 7.0, height: float = 4.4, panels: int = 1) -> tuple[Any, Any]:
    """Make an empty figure of ``width`` and ``height`` inches.

    Returns:
        (figure, axes), or (figure, list of axes) for several ``panels`` side by side.
    """
    from matplotlib.figure import Figure  # object-oriented: no pyplot, no global state

    figure: Any = Figure(figsize=(width, height), layout="constrained")
    figure._repr_png_ = lambda: save_png(figure)  # a notebook's hook: it shows the figure
    axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes[0] if panels == 1 else axes


def shades(count: int) -> Sequence[Any]:
    """Pick ``count`` colours from dark to light, which keep their order in grey."""
    from matplotlib import colormaps

    return [colormaps["cividis"](0.8 * i / max(1, count - 1)) for i in range(count)]


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Pick at most ``count`` (2 or more) evenly spread ``items``, the first and last included."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def log_scale(axes: Any, heights: Sequence[float]) -> None:
    """Make the scale log; if some ``heights`` are 0, linear below the smallest positive one."""
    positive = [height for height in heights if height > 0]
    if len(positive) == len(heights):
        axes.set_yscale("log")
    elif positive:
        axes.set_yscale("symlog", linthresh=min(positive), linscale=0.4)


def save_png(figure: Any) -> bytes:
    """Save the figure as PNG; the same figure gives the same bytes."""
    return _save(figure, format="png", dpi=DPI, metadata={"Software": None})


def save_pdf(figure: Any) -> bytes:
    """Save the figure as PDF; the same figure gives the same bytes."""
    return _save(figure, format="pdf", metadata={"CreationDate": None})


def _save(figure: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, **options)
    figure.set_layout_engine("none")  # it is laid out; doing so again takes most of the time
    return buffer.getvalue()
