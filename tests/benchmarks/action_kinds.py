"""What each kind of action costs and buys in this runtime, from short contexts to long ones.

    python tests/benchmarks/action_kinds.py --contexts 512 2048 8000 --out docs/results/action_kinds

One ``kvsharer bench`` a kind: all layers do it, or every second one where the others have to keep
their KV. The full cache is measured in turn with the plan, so the ratios are of one run. Run again,
it measures only the kinds that are not there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsharer_exp.reporting.bench_table import mib
from tests.benchmarks.kept import keep_results

KINDS = {
    "half read": ("{own}", "{before}"),
    "half affine": ("{own}", "a"),
    "4 bits": ("{own}q4g128s4",),
    "4 + 252 tokens": ("{own}w4+252",),
    "SnapKV, 256 of the prompt": ("{own}snap256+32",),
    "H2O, 256 tokens": ("{own}h256",),
}
"""By kind, what layers do in turn: texts of actions, with the number of a layer, or of the first
of its turn."""


def plan_of(texts: Sequence[str], num_layers: int) -> str:
    return "_".join(
        texts[layer % len(texts)].format(own=layer, before=layer - layer % len(texts))
        for layer in range(num_layers)
    )


def bench(run: Path, plan: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The cells of this ``kvsharer bench``; it is run where there is no result of it."""
    if not (run / "result.json").exists():
        words = [
            *(f"plan={plan}", f"bench.contexts={options.contexts}".replace(" ", "")),
            *(f"bench.new_tokens={options.new_tokens}", f"bench.repeats={options.repeats}"),
            *(f"hydra.run.dir={run}", f"tracking.folder={run.parent / 'mlruns'}", "-q"),
        ]
        command = [sys.executable, "-m", "kvsharer_exp", "bench", *words, *options.words]
        subprocess.run(command, check=True)
    cells: list[dict[str, Any]] = json.loads((run / "result.json").read_text("utf-8"))["cells"]
    return cells


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| tokens | plan | cache, MiB | fewer bytes: measured | predicted | prefill peak, MiB "
        "| prefill | decode |",
        "| --- " * 8 + "|",
    ]
    for number, cell in enumerate(next(iter(found.values()))):
        context, full = cell["context"], cell["full"]
        cache, peak = mib(full["cache_bytes"]), mib(full["prefill_peak_bytes"])
        lines.append(f"| {context:,} | full cache | {cache} | 1 | 1 | {peak} | 1 | 1 |")
        for kind, cells in found.items():
            own, faster, said = (cells[number][key] for key in ("shared", "speedup", "predicted"))
            fewer = cells[number]["full"]["cache_bytes"] / own["cache_bytes"]
            lines.append(
                f"| {context:,} | {kind} | {mib(own['cache_bytes'])} | {fewer:.2f} "
                f"| {1 / said['kv_fraction']:.2f} | {mib(own['prefill_peak_bytes'])} "
                f"| {faster['prefill']:.2f} | {faster['decode']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8000])
    parser.add_argument("--layers", type=int, default=30, help="of the model")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--words", nargs="*", default=["model=smollm2", "model.dtype=float32"])
    parser.add_argument("--runs", type=Path, help="where the runs are kept")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.runs or Path(tempfile.mkdtemp(prefix="action-kinds-"))
    found = {}
    for number, (kind, texts) in enumerate(KINDS.items()):
        found[kind] = bench(folder / f"kind-{number}", plan_of(texts, options.layers), options)
        sys.stdout.write(table({kind: found[kind]}))
        sys.stdout.flush()
    keep_results(options.out, "action_kinds", table(found), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
