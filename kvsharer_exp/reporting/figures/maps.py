"""Draw sharing maps as diagrams: which layers keep their KV, and which read whose.

The page of a sweep shows the maps of its front so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvsharer_exp.reporting.figures.style import BLACK, BLUE, CYCLE, GREY, empty
from kvsharer_exp.values.sharing_map import SharingMap

_REACH = 2.4  # how far the longest arc bulges, in widths of a layer's box


def map_figure(maps: Mapping[str, SharingMap], title: str = "") -> Any:
    """Draw each map as a column of layers, the first layer on top.

    Owners are shaded and targets are white. An arc goes from every target to the source whose KV it
    reads. ``maps`` holds each map by the text above its column.
    """
    deepest = max(sharing_map.num_layers for sharing_map in maps.values())
    width, height = max(2.6, 1.45 * len(maps)), 1.0 + 0.19 * deepest
    figure, panels = empty(width, height, panels=len(maps))
    for axes, (label, sharing_map) in zip(
        panels if len(maps) > 1 else [panels], maps.items(), strict=True
    ):
        _draw(axes, sharing_map)
        axes.set_ylim(deepest - 0.4, -0.6)
        axes.set_title(label, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _draw(axes: Any, sharing_map: SharingMap) -> None:
    from matplotlib.patches import FancyArrowPatch, Rectangle
    from matplotlib.path import Path

    sources = {sharing_map.kv_source_layers[target] for target in sharing_map.targets}
    colours = {source: CYCLE[i % len(CYCLE)] for i, source in enumerate(sorted(sources))}
    for layer, source in enumerate(sharing_map.kv_source_layers):
        owner = source == layer
        edge = GREY if owner else colours[source]
        fill: Any = (BLUE, 0.16) if owner else "white"
        box = Rectangle((0, layer - 0.42), 1, 0.84, facecolor=fill, edgecolor=edge, lw=0.9)
        axes.add_patch(box)
        axes.text(0.5, layer, str(layer), ha="center", va="center", fontsize=6.5, color=BLACK)
        if not owner:
            bulge = 1 + _REACH * (0.25 + 0.75 * (layer - source) / sharing_map.num_layers)
            points = [(1.05, layer), (bulge, layer), (bulge, source), (1.05, source)]
            path = Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
            arrow = FancyArrowPatch(
                path=path, arrowstyle="-|>", mutation_scale=6, lw=1, color=colours[source]
            )
            axes.add_patch(arrow)
    axes.set_xlim(-0.1, 1 + _REACH * 0.85)
    axes.set_axis_off()
