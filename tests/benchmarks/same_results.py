"""Does another checkout of this project still give the same results?

Runs one command of every kind on the tiny random model with the code of each checkout, compares
every value of the ``result.json`` files, and then lets the new code read what the old code left:
its runs, its study, its export. For a change that may move code but no number.

    python tests/benchmarks/same_results.py OLD_CHECKOUT NEW_CHECKOUT --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MAP = "map=0_0_2_3_4_4"
QUICK = (
    *("model=tiny", "calibration.num_windows=3", "calibration.window_tokens=16", "seed=3"),
    *("heldout.num_windows=4", "heldout.window_tokens=24", "compression.ratios=[0.34,0.5]"),
    *("scoring.num_windows=9", "scoring.window_tokens=24", "search.threshold=-1"),
)
TASKS = ("scoring.report.tasks=[wiki_next]", "scoring.report.limit=4")
NO_TASKS = ("scoring.report.tasks=[]",)
SWEEP = (*NO_TASKS, "study.n_trials=14", "study.margin=9", "study.final_windows=8")
ARMS = "ablate.arms=[dissimilar_tested,random_untested,trailing_layers]"
COMMANDS: dict[str, tuple[str, ...]] = {
    "calibrate": ("calibrate", *NO_TASKS),
    "search": ("search", *NO_TASKS),
    "evaluate": ("evaluate", MAP, *TASKS),
    "bench": ("bench", MAP, *NO_TASKS, "bench.contexts=[8]", "bench.new_tokens=2"),
    "calculate": ("bench", *NO_TASKS, "bench.contexts=[8]"),
    "sweep": ("sweep", *SWEEP, "study.name=evolved"),
    "sweep_tpe": ("sweep", *SWEEP, "study.name=tpe", "sampler=tpe", *TASKS),
    "ablate": (
        *("ablate", ARMS, "ablate.draws=2", "ablate.every_pair=true", "bench.repeats=1"),
        *("ablate.thresholds=[-1,0.5]", "ablate.lengths=[[8,2]]", *NO_TASKS),
    ),
    "export": ("export", MAP, *NO_TASKS),
    "generate": ("generate", MAP, "generate.prompt=Once upon", "generate.max_new_tokens=6"),
}
MADE_AGAIN = ("evaluate", "sweep", "ablate")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    differing = 0
    for side in ("old", "new"):
        for name, words in COMMANDS.items():
            run(getattr(asked, side), asked.out / side, name, *words, *QUICK)
    for name in COMMANDS:
        differing += compare(name, read(asked.out / "old" / name), read(asked.out / "new" / name))
    differing += read_what_old_left(asked.new, asked.out)
    print("the same" if not differing else f"{differing} values differ")
    sys.exit(1 if differing else 0)


def read_what_old_left(new: Path, out: Path) -> int:
    """The new code on the old store: reports, runs made again, a study continued, an export."""
    old, differing = out / "old", 0
    runs = ",".join(read(old / name)["mlflow_run_id"] for name in ("search", "sweep", "ablate"))
    run(new, old, "report", "report", f"run={runs}")
    print(f"report      {len(read(old / 'report')['values'])} values of old runs")
    for name in MADE_AGAIN:
        words = ("reproduce", f"run={read(old / name)['mlflow_run_id']}", "reproduce.tolerance=0")
        run(new, old, f"again_{name}", *words)
        print(f"reproduce   {name}: matches {read(old / f'again_{name}')['matches']}")
        differing += not read(old / f"again_{name}")["matches"]
    run(new, old, "continued", *COMMANDS["sweep"], "study.n_trials=16", *QUICK)
    trials, before = read(old / "continued")["trials"], read(old / "sweep")["trials"]
    print(f"study       {before} continued to {trials}")
    differing += sum(trials.values()) - trials["cached"] != 16
    load = "from kvsharer_exp import load_exported; print(load_exported('export/export')[0].dtype)"
    call(new, old, "-c", load)
    print("export      an old export loads")
    return differing


def run(checkout: Path, folder: Path, name: str, *words: str) -> None:
    """One command of ``checkout`` in ``folder``, its run folder called ``name``."""
    folder.mkdir(parents=True, exist_ok=True)
    call(checkout, folder, "-m", "kvsharer_exp", *words, f"hydra.run.dir={name}", "--quiet")


def call(checkout: Path, folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} in {folder}: {done.returncode}\n{done.stderr}")


def read(folder: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return held


def compare(name: str, old: dict[str, Any], new: dict[str, Any]) -> int:
    """Print how many values are the same to the last digit; returns how many are not."""
    from kvsharer_exp.shipping.reproduction import compare_results

    values = compare_results(old, new, 0.0)
    clocked = ("export.path", "tokens_per_second")  # a folder's name, a clock's word
    wrong = [v for v in values if v.verdict != "exact" and not v.path.endswith(clocked)]
    print(f"{name:11s} {len(values) - len(wrong)} of {len(values)} values exact")
    for value in wrong[:10]:
        print(f"  {value.path}: {value.recorded} → {value.again} ({value.verdict})")
    return len(wrong)


if __name__ == "__main__":
    main()
