"""Do more workers find as good a front? Sweeps of equal trials with one and with two workers.

    python tests/benchmarks/workers_front.py --trials 60 --out docs/results/workers_front

One ``kvsharer sweep`` a seed and number of workers, one thread a worker. A worker asks for plans
while others are under way, so it knows less; the hypervolume of the front says what that costs. A
seed also draws the windows, so sweeps of one seed are compared, and the spread is that of seeds.
Run again, it makes only the sweeps that are not there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tests.benchmarks.kept import keep_results

WORKERS = 1, 2


def sweep(folder: Path, seed: int, workers: int, options: argparse.Namespace) -> dict[str, Any]:
    """The ``result.json`` of this sweep; it is made where it is not there."""
    run = folder / f"seed-{seed}-workers-{workers}"
    if not (run / "result.json").exists():
        words = [
            *(f"seed={seed}", f"study.n_trials={options.trials}", f"study.name={run.name}"),
            *("executor=processes", f"executor.num_workers={workers}", "study.final_windows=0"),
            *("scoring.search.tasks=[]", "scoring.report.tasks=[]", "heldout.num_windows=1"),
            *(f"hydra.run.dir={run}", f"tracking.folder={folder / 'mlruns'}", "-q"),
        ]
        command = [sys.executable, "-m", "kvsharer_exp", "sweep", *words, *options.words]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| seed | one worker | two workers | two / one |", "| --- " * 4 + "|"]
    for row in rows:
        one, two = row["hypervolume"]
        lines.append(f"| {row['seed']} | {one:.4f} | {two:.4f} | {two / one:.4f} |")
    columns = list(zip(*(row["hypervolume"] for row in rows), strict=True))
    spread = [f"{fmean(column):.4f} ± {stdev(column):.4f}" for column in columns]
    ratio = fmean(two / one for one, two in zip(*columns, strict=True))
    lines.append(f"| mean ± standard deviation | {spread[0]} | {spread[1]} | {ratio:.4f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--words", nargs="*", default=["model=smollm2", "model.dtype=float32"])
    parser.add_argument("--runs", type=Path, help="where the sweeps are kept")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.runs or Path(tempfile.mkdtemp(prefix="workers-front-"))
    rows = []
    for seed in options.seeds:
        found = [sweep(folder, seed, workers, options) for workers in WORKERS]
        rows.append({"seed": seed, "hypervolume": [each["hypervolume"] for each in found]})
        sys.stdout.write(f"seed {seed}: {rows[-1]['hypervolume']}\n")
        sys.stdout.flush()
    sys.stdout.write(table(rows))
    keep_results(options.out, "workers_front", table(rows), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
