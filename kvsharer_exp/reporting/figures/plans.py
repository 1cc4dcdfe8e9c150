"""Draw KV plans as strips: one row a plan, one cell a layer, coloured by what the layer does.

The page of a sweep shows the plans of its front so, if they do more than sharing. `maps` draws
sharing maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvsharer_exp.reporting.figures.style import BLACK, BLUE, GREEN, GREY, PURPLE, YELLOW, empty
from kvsharer_exp.reporting.plan_kinds import kv_percent
from kvsharer_exp.values.actions.affine import Affine
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.constant import Constant
from kvsharer_exp.values.actions.drop import Drop
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.actions.read import Read
from kvsharer_exp.values.actions.read_kv import ReadKV
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.precision import BITS, FULL

_WIDEST = 16.0  # inches for all cells of a row
_DARK = "#4D4D4D"
_SHADES = {16: 0.0, 8: 0.34, 4: 0.58, 3: 0.74, 2: 0.87}  # how much white a number of bits adds


@dataclass(frozen=True, slots=True)
class Strip:
    """One row of the picture; ``score`` is the text at its right side."""

    plan: KVPlan
    kv_fraction: float
    score: str = ""


@dataclass(frozen=True, slots=True)
class Look:
    """How a cell is drawn: its colour, its letters and their colour, and its line of the legend."""

    fill: str
    text: str
    ink: str
    legend: str


def look_of(action: Action) -> Look:
    """How a layer that does ``action`` is drawn."""
    match action:
        case Own(bits=bits, keep=keep):
            letter = "" if keep is None else str(keep)[0]
            tokens = f", {letter}: of some tokens" if letter else ""
            fill, ink = _lighter(BLUE, _SHADES[bits]), "white" if bits == FULL else BLACK
            return Look(fill, f"{bits}{letter}", ink, f"own, {bits} bits{tokens}")
        case Read(source=source):
            return Look(_lighter(YELLOW, 0.45), str(source), BLACK, "read (number: the source)")
        case ReadKV(key_source=key, value_source=value):
            text = f"{key}\n{value}"
            return Look(_lighter(YELLOW, 0.75), text, BLACK, "read keys (above), values (below)")
        case Drop():
            return Look(_DARK, "x", "white", "x: drop")
        case Constant():
            return Look(_lighter(GREEN, 0.25), "c", "white", "c: constant")
        case Affine():
            return Look(_lighter(PURPLE, 0.1), "a", "white", "a: affine")
    return Look("white", action.name[:1], BLACK, f"{action.name[:1]}: {action.name}")


def plans_figure(strips: Sequence[Strip], title: str = "") -> Any:
    """Draw ``strips`` with the most KV on top.

    The share of the KV that is kept stands on the left, the score on the right. The legend names
    what occurs.
    """
    strips = sorted(strips, key=lambda strip: -strip.kv_fraction)
    deepest = max((strip.plan.num_layers for strip in strips), default=1)
    side = min(0.27, _WIDEST / deepest)
    width, height = max(7.0, 2.0 + side * deepest), 1.75 + 0.27 * len(strips)
    figure, axes = empty(width, height)
    for row, strip in enumerate(strips):
        for layer, action in enumerate(strip.plan.actions):
            _cell(axes, layer, row, look_of(action), size=min(7.0, 24 * side))
    _sides(axes, strips, deepest)
    _legend(axes, strips, columns=max(2, int(width / 2.1)))
    axes.set_title(title, fontsize=10, pad=10)
    return figure


def _cell(axes: Any, layer: int, row: int, look: Look, *, size: float) -> None:
    from matplotlib.patches import Rectangle

    corner = (layer - 0.47, row - 0.42)
    axes.add_patch(Rectangle(corner, 0.94, 0.84, facecolor=look.fill, edgecolor="none"))
    if look.text:
        small = size * (0.8 if "\n" in look.text else 1)
        place = {"ha": "center", "va": "center_baseline", "linespacing": 0.85}
        axes.text(layer, row, look.text, color=look.ink, fontsize=small, **place)


def _sides(axes: Any, strips: Sequence[Strip], deepest: int) -> None:
    """Label the layers below, the KV on the left and the scores on the right."""
    axes.set_xlim(-0.6, deepest - 0.4)
    axes.set_ylim(len(strips) - 0.4, -0.6)
    step = 1 if deepest <= 12 else 5
    axes.set_xticks(range(0, deepest, step))
    kept = [f"{kv_percent(strip.kv_fraction, fine=True)} KV" for strip in strips]
    axes.set_yticks(range(len(strips)), kept)
    axes.set_xlabel("layer", fontsize=9)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    if any(strip.score for strip in strips):
        right = axes.secondary_yaxis("right")
        right.set_yticks(range(len(strips)), [strip.score for strip in strips])
        right.tick_params(length=0, labelsize=8)
        right.spines[:].set_visible(False)


def _legend(axes: Any, strips: Sequence[Strip], *, columns: int) -> None:
    from matplotlib.patches import Patch

    looks = {look.legend: look for s in strips for look in map(look_of, s.plan.actions)}
    ours = [Own(bits) for bits in sorted(BITS, reverse=True)]
    order = [look_of(action).legend for action in (*ours, Read(0), ReadKV(0, 1))]
    names = sorted(looks, key=lambda n: (order.index(n) if n in order else len(order), n))
    patches = [Patch(facecolor=looks[n].fill, edgecolor=GREY, lw=0.5, label=n) for n in names]
    if patches:
        axes.figure.legend(
            handles=patches, loc="outside lower center", ncols=min(columns, len(patches)),
            frameon=False, fontsize=8, handlelength=1.2, handleheight=1.0,
        )  # fmt: skip


def _lighter(colour: str, white: float) -> str:
    """``colour`` mixed with a share of ``white``."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (255 - part) * white):02X}" for part in parts)
