"""How good are the maps of a sweep of 20 minutes, on text it never saw?

    python tests/benchmarks/front_quality.py [--minutes 20] [--seeds 0 1 2 3 4]

One ``kvsharer sweep`` a seed, then perplexity over the full cache's on the same held-out windows
for all: of the front's maps of ``--sizes`` shared layers, and, on fewer windows, for they are far
off, of those that both greedy orders find on the same calibration windows, the better of the two.
Writes ``front_quality.md`` and ``.json`` to ``--out``; run again, it makes only the sweeps that
are not there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from search_efficiency import Bench, HeldOut

from kvsharer_exp.model.load import load_model
from kvsharer_exp.reporting.markup import to_markdown
from kvsharer_exp.values.intervals import t_interval
from kvsharer_exp.values.sharing_map import SharingMap
from tests.benchmarks.kept import keep_results


def sweep(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What the sweep of this seed left; made where it is not there."""
    run = folder / f"seed-{seed}"
    if not (run / "result.json").exists():
        overrides = {
            "model": options.model,
            "model.dtype": options.dtype,
            "seed": seed,
            "study.minutes": options.minutes,
            "study.name": f"front_quality-{seed}",
            "study.fresh": "true",
            "heldout.num_windows": 24,
            "scoring.report.tasks": "[]",
            "hydra.run.dir": run,
            "tracking.folder": folder / "mlruns",
        }
        command = [sys.executable, "-m", "kvsharer_exp", "sweep"]
        subprocess.run([*command, *(f"{k}={v}" for k, v in overrides.items())], check=True)
    found: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return found


def measure(
    seed: int, found: dict[str, Any], bench: Bench, held_out: HeldOut, few: HeldOut
) -> dict[str, Any]:
    """Ratios by size: of the front, with their intervals, and of the better greedy order."""
    sizes = bench.options.sizes
    # A size that is not on the front is beaten by one that shares more.
    front = {n: next(e for e in found["front"] if e["num_shared"] >= n) for n in sizes}
    maps = [SharingMap(tuple(front[size]["kv_source_layers"])) for size in sizes]
    walked = [sharing_map for order in bench.walks for sharing_map in bench.maps(order)]
    return {
        "seed": seed,
        "maps": sum(found["trials"].values()) - found["trials"]["cached"],
        "hypervolume": found["hypervolume"],
        "stages": found["stages"],
        "kl": [front[size]["scores"]["kl"] for size in sizes],
        "map": [sharing_map.kv_source_layers for sharing_map in maps],
        "front": [held_out(sharing_map) for sharing_map in maps],
        "interval": [held_out.interval(sharing_map) for sharing_map in maps],
        "greedy": [min(few(m) for m in walked if len(m.targets) == size) for size in sizes],
    }


def table(rows: Sequence[dict[str, Any]], sizes: Sequence[int]) -> str:
    """Markdown: one row per seed, then mean ± half the 95 % interval."""
    kinds = {"kl": "KL", "front": "ppl ratio", "greedy": "better greedy"}
    head = ["seed", "maps", "hypervolume"]
    head += [f"{words}, {size}" for words in kinds.values() for size in sizes]
    lines = [head]
    columns = []
    for row in rows:
        numbers = [row["hypervolume"], *(value for kind in kinds for value in row[kind])]
        columns.append(numbers)
        lines.append([str(row["seed"]), str(row["maps"]), *(f"{n:.3f}" for n in numbers)])
    if len(rows) > 1:
        means = [t_interval(values) for values in zip(*columns, strict=True)]
        cells = [f"{m.mean:.3f} ± {m.high - m.mean:.3f}" for m in means]
        lines.append(["mean", str(sum(row["maps"] for row in rows) // len(rows)), *cells])
    return to_markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 7])
    parser.add_argument("--heldout-windows", type=int, default=240)
    parser.add_argument("--greedy-windows", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("outputs/front_quality"))
    options = parser.parse_args()
    options.windows, options.window_tokens = 30, 64  # the sweep's calibration
    found = {seed: sweep(options.out, seed, options) for seed in options.seeds}
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    held_out = HeldOut(model, tokenizer, options.heldout_windows)
    few = HeldOut(model, tokenizer, options.greedy_windows)
    rows = [
        measure(seed, result, Bench(model, tokenizer, options, seed), held_out, few)
        for seed, result in found.items()
    ]
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    versions = found[options.seeds[0]]["versions"]
    record = {"options": settings, "versions": versions, "rows": rows}
    text = table(rows, options.sizes)
    keep_results(options.out, "front_quality", text, record)
    print(text)


if __name__ == "__main__":
    main()
