"""Write what ``bench`` measured as a table, and say how fast it was and where that comes from.

The commands ``bench`` and ``ablate`` print both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ROWS_PER_CELL = 4
"""The rows of each cell in `cells_table`."""

_PEAKS = {"prefill_peak_bytes": "prefill peak", "decode_peak_bytes": "decode peak"}


def cells_table(cells: Sequence[Mapping[str, Any]], kind: str) -> list[list[str]]:
    """Header and four rows for each cell of ``bench``; ``kind`` is ``map`` or ``plan``.

    Two rows have the medians of the full cache and of the map or plan, with the lowest and the
    highest value in brackets. The third has their ratios to the full cache, and the fourth those
    that were predicted. The peak of the prefill is the most that it had allocated at once, the
    cache among it. That of a decode step is without the cache that was there before it.
    """
    memory = "peak_memory_bytes"
    label = "peak"
    if memory not in cells[0]["full"]:
        memory, label = "resident_bytes", "RSS"
    rows = [["batch×ctx", "", "cache", *_PEAKS.values(), label, "prefill s", "tokens/s"]]
    for cell in cells:
        where = f"{cell['batch']}×{cell['context']}"
        for name, side in (("full", "full"), (kind, "shared")):
            got = cell[side]
            rows.append(
                [
                    where,
                    name,
                    mib(got["cache_bytes"]),
                    *(mib(got[peak]) if peak in got else "–" for peak in _PEAKS),
                    mib(got[memory]["median"]),
                    _spread(got["prefill_seconds"], 3),
                    _spread(got["decode_tokens_per_second"], 2),
                ]
            )
            where = ""
        kept = cell["shared"]["cache_bytes"] / cell["full"]["cache_bytes"]
        said, rates = cell["predicted"], cell["speedup"]
        rows.append(["", f"{kind}/full", *_ratios(kept, rates["prefill"], rates["decode"])])
        by_shapes = said["kv_fraction"], said["prefill_speedup"], said["decode_speedup"]
        rows.append(["", "predicted", *_ratios(*by_shapes)])
    return rows


def _ratios(kept: float, prefill_rate: float, decode_rate: float) -> list[str]:
    """The cells of a row of ratios to the full cache: each times the value in its column."""
    return [f"×{kept:.3f}", "", "", "", f"×{1 / prefill_rate:.3f}", f"×{decode_rate:.3f}"]


def _spread(values: Mapping[str, float], digits: int) -> str:
    low, high = values["min"], values["max"]
    return f"{values['median']:.{digits}f}\n({low:.{digits}f}–{high:.{digits}f})"


def mib(num_bytes: float) -> str:
    """Bytes as MiB with two digits."""
    return f"{num_bytes / 2**20:.2f}"


def where_from(cell: Mapping[str, Any], kind: str) -> str:
    """Say how fast the map or plan ran, and where a difference comes from by the shapes.

    ``kind`` is ``map`` or ``plan``.
    """
    rates = cell["speedup"]
    return (
        f"At batch {cell['batch']}, context {cell['context']} the {kind} decodes at "
        f"{rates['decode']:.2f} times the rate of the full cache and prefills at "
        f"{rates['prefill']:.2f} times. {_by_shapes(cell['predicted'], kind)}"
    )


def _by_shapes(predicted: Mapping[str, Any], kind: str) -> str:
    copies = predicted["concatenation_bytes_per_step"]
    reads = predicted["attention_read_bytes_per_step"]
    parts = {
        "DynamicCache's concatenation copies": copies["shared"] - copies["full"],
        "attention reads": reads["shared"] - reads["full"],
        "parameters": -predicted["kv_weight_bytes_saved"],
        "quantised KV written out": predicted["dequantisation_bytes_per_step"]["shared"],
    }
    listed = ", ".join(f"{name} {bytes_ / 2**20:+.2f}" for name, bytes_ in parts.items() if bytes_)
    if kind == "map" and not listed:
        return "The map shares no layer, so nothing is saved and both are the same model."
    moved, flops_saved = sum(parts.values()), 1 - 1 / predicted["prefill_speedup"]
    change = f"{mib(abs(moved))} MiB {'more' if moved > 0 else 'less'} ({listed})"
    return (
        f"By the shapes, a decode step moves {change if listed else 'as many bytes'}, prefill "
        f"takes {abs(flops_saved):.1%} {'more' if flops_saved < 0 else 'fewer'} FLOPs, and the "
        f"same memory holds a {1 / predicted['kv_fraction']:.2f} times larger batch."
    )
