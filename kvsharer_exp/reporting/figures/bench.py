"""Draw predicted against measured: memory, prefill and decode of a map beside the full cache.

The command ``bench`` keeps this picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvsharer_exp.reporting.figures.style import BLACK, BLUE, GREY, empty


def bench_figure(cells: Sequence[Mapping[str, Any]], title: str = "") -> Any:
    """Draw cache and rates as multiples of those of the full cache, in each cell of ``bench``.

    Below 1 are a smaller cache and slower runs. What the shapes predict stands beside what was
    measured. The measured bar is the ratio of medians. The line on it spans the ratios that the
    slowest and fastest rounds allow.
    """
    figure, panels = empty(2.6 + 0.9 * 3 * max(2, len(cells)) ** 0.5 * 1.4, 3.8, panels=3)
    names = [f"{cell['batch']}×{cell['context']}" for cell in cells]
    kinds = ("KV cache, × full", "prefill rate, × full", "decode rate, × full")
    for axes, kind, rows in zip(panels, kinds, zip(*map(_ratios, cells), strict=True), strict=True):
        for number, (predicted, measured, low, high) in enumerate(rows):
            first = number == 0
            axes.bar(
                number - 0.2, predicted, 0.36, color="white", edgecolor=GREY, hatch="///",
                label="predicted from shapes" if first else None,
            )  # fmt: skip
            axes.bar(number + 0.2, measured, 0.36, color=BLUE, label="measured" if first else None)
            axes.vlines(number + 0.2, low, high, color=BLACK, lw=1.2)
            axes.annotate(
                f"{measured:.2f}", (number + 0.2, max(measured, high)), ha="center", fontsize=7,
                xytext=(0, 3), textcoords="offset points",
            )  # fmt: skip
        axes.axhline(1, color=BLACK, lw=0.8, linestyle="--")
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel("batch × context")
        axes.set_title(kind, fontsize=10)
        axes.margins(y=0.15)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                  frameon=False)  # fmt: skip
    figure.suptitle(title, fontsize=11)
    return figure


def _ratios(cell: Mapping[str, Any]) -> list[tuple[float, float, float, float]]:
    """(predicted, measured, lowest, highest) of cache, prefill and decode; 1 is the full cache."""
    full, shared, predicted = cell["full"], cell["shared"], cell["predicted"]
    kept = shared["cache_bytes"] / full["cache_bytes"]
    before, after = full["prefill_seconds"], shared["prefill_seconds"]
    slow, fast = full["decode_tokens_per_second"], shared["decode_tokens_per_second"]
    return [
        (predicted["kv_fraction"], kept, kept, kept),
        (
            predicted["prefill_speedup"],
            cell["speedup"]["prefill"],
            before["min"] / after["max"],
            before["max"] / after["min"],
        ),
        (
            predicted["decode_speedup"],
            cell["speedup"]["decode"],
            fast["min"] / slow["max"],
            fast["max"] / slow["min"],
        ),
    ]
