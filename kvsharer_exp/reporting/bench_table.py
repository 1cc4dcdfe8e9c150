"""Write what ``bench`` measured as a table, and say in a sentence where differences come from.

The commands ``bench`` and ``ablate`` print both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ROWS_PER_CELL = 4
"""The rows of each cell in `cells_table`."""

_PEAKS = {"prefill_peak_bytes": "prefill peak", "decode_peak_bytes": "decode peak"}


def cells_table(cells: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and four rows for each cell of ``bench``.

    Two rows have the medians of full and shared, with the lowest and the highest value in brackets.
    The third says how many times better shared is, and the fourth what was predicted. The peak of
    the prefill is the most that it had allocated at once, the cache among it. That of a decode step
    is without the cache that was there before it.
    """
    memory = "peak_memory_bytes"
    label = "peak"
    if memory not in cells[0]["full"]:
        memory, label = "resident_bytes", "RSS"
    rows = [["batch×ctx", "", "cache", *_PEAKS.values(), label, "prefill s", "tokens/s"]]
    for cell in cells:
        where = f"{cell['batch']}×{cell['context']}"
        for side in ("full", "shared"):
            got = cell[side]
            rows.append(
                [
                    where,
                    side,
                    mib(got["cache_bytes"]),
                    *(mib(got[peak]) if peak in got else "–" for peak in _PEAKS),
                    mib(got[memory]["median"]),
                    _spread(got["prefill_seconds"], 3),
                    _spread(got["decode_tokens_per_second"], 2),
                ]
            )
            where = ""
        smaller = cell["full"]["cache_bytes"] / cell["shared"]["cache_bytes"]
        said, faster = cell["predicted"], cell["speedup"]
        measured = [f"×{faster['prefill']:.3f}", f"×{faster['decode']:.3f}"]
        by_shapes = [f"×{said['prefill_speedup']:.3f}", f"×{said['decode_speedup']:.3f}"]
        rows.append(["", "better", f"×{smaller:.3f}", "", "", "", *measured])
        fewer = f"×{1 / said['kv_fraction']:.3f}"
        rows.append(["", "predicted", fewer, "", "", "", *by_shapes])
    return rows


def _spread(values: Mapping[str, float], digits: int) -> str:
    low, high = values["min"], values["max"]
    return f"{values['median']:.{digits}f}\n({low:.{digits}f}–{high:.{digits}f})"


def mib(num_bytes: float) -> str:
    """Bytes as MiB with two digits."""
    return f"{num_bytes / 2**20:.2f}"


def where_from(cell: Mapping[str, Any]) -> str:
    """Say in a sentence, by the shapes, where the difference between full and shared comes from."""
    predicted = cell["predicted"]
    copies = predicted["concatenation_bytes_per_step"]
    copied, weights = copies["full"] - copies["shared"], predicted["kv_weight_bytes_saved"]
    if not copied:
        return "The map shares no layer, so nothing is saved and both columns are the same model."
    reads = predicted["attention_read_bytes_per_step"]
    decoded = predicted.get("dequantisation_bytes_per_step", {}).get("shared", 0)
    read = reads["full"] - reads["shared"]
    if read or decoded:
        return _of_plan(cell, copied, read, weights, decoded)
    moved = copied + weights
    return (
        f"At batch {cell['batch']}, context {cell['context']} a decode step moves "
        f"{mib(moved)} MiB less: {copied / moved:.0%} of it are DynamicCache's concatenation "
        f"copies, {weights / moved:.0%} the targets' K/V projections; attention reads stay the "
        f"same, prefill saves only {1 - 1 / predicted['prefill_speedup']:.1%} of its FLOPs, and "
        f"the memory freed holds a {1 / predicted['kv_fraction']:.2f} times larger batch."
    )


def _of_plan(cell: Mapping[str, Any], copied: int, read: int, weights: int, decoded: int) -> str:
    """The sentence for a plan with stand-ins, which read no KV, or with quantised layers."""
    parts = {
        "the cache's copies": -copied,
        "attention reads": -read,
        "parameters": -weights,
        "quantised KV written out": decoded,
    }
    predicted, moved = cell["predicted"], sum(parts.values())
    listed = ", ".join(f"{name} {bytes_ / 2**20:+.2f}" for name, bytes_ in parts.items() if bytes_)
    return (
        f"At batch {cell['batch']}, context {cell['context']} a decode step moves "
        f"{mib(abs(moved))} MiB {'more' if moved > 0 else 'less'} ({listed}); prefill saves "
        f"{1 - 1 / predicted['prefill_speedup']:.1%} of its FLOPs, and the memory freed holds a "
        f"{1 / predicted['kv_fraction']:.2f} times larger batch."
    )
