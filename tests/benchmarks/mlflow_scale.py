"""What 5,000 trials cost: logging one, the UI's start and memory, its pages' load time.

    python tests/benchmarks/mlflow_scale.py [trials] [folder]

Prints one JSON object. Page times are from the address to a drawn chart or a filled table, in
headless chromium; left out where there is none.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from kvsharer_exp.search.front import pareto_front
from kvsharer_exp.tracking.tracker import Tracker
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import TrialResult
from tests.browser import CHROMIUM, browser

LAYERS = 30


def trial(number: int, draw: random.Random) -> TrialResult:
    """A random map with scores of the right size and names."""
    sharing_map = SharingMap.identity(LAYERS)
    for target in draw.sample(range(1, LAYERS), draw.randint(1, 11)):
        sharing_map = sharing_map.share(target, draw.randrange(target))
    shared = len(sharing_map.targets)
    kl = 0.02 * 1.5**shared * draw.lognormvariate(0, 0.5)
    scores = {"kl": kl, "cosine": 1 - kl / 9, "perplexity/calibration": 34 * (1 + kl)}
    params = {f"source_{layer}": layer for layer in range(1, LAYERS)}
    size = Footprint(100, 1 - shared / LAYERS, 0)
    return TrialResult(
        number, params, sharing_map, scores, size, "complete", "fit", 1.0, -kl, "sampler"
    )


def log_trials(tracker: Tracker, count: int) -> dict[str, Any]:
    """A sweep of ``count`` trials; what one costs, at the start and at the end."""
    draw = random.Random(0)
    parent = tracker.start_run("scale · sweep", tags={"command": "sweep"}, params={"seed": "0"})
    runs: dict[int, str] = {}
    results, seconds, busy = [], [], []
    for number in range(count):
        results.append(trial(number, draw))
        started, working = time.perf_counter(), time.process_time()
        runs[number] = tracker.log_trial(parent, results[-1], {}, name=f"scale · {number}")
        tracker.log_metrics(parent, {"hypervolume": float(number)}, step=number)
        seconds.append(time.perf_counter() - started)
        busy.append(time.process_time() - working)
    front = pareto_front(results)
    started = time.perf_counter()
    for member in front:
        tracker.log_map(runs[member.number], member.plan, member.scores, name="scale")
    tracker.mark_front([runs[member.number] for member in front])
    view = tracker.save_view(parent, ["kl", "perplexity/calibration"], name="scale")
    published = time.perf_counter() - started
    tracker.finish(parent)
    return {
        "trials": count,
        "log_seconds_per_trial": {
            "first_100": median(seconds[:100]),
            "last_100": median(seconds[-100:]),
            "cpu_first_100": median(busy[:100]),
            "cpu_last_100": median(busy[-100:]),
        },
        "publish_front_seconds": published,
        "front": len(front),
        "compare": view.partition("#")[2],
    }


def processes(pid: int) -> list[int]:
    """The process and all it started."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [pid, *(one for child in found.stdout.split() for one in processes(int(child)))]


def resident_mib(pid: int) -> float:
    """Resident memory of all of them, pages they share counted in each."""
    pages = [int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in processes(pid)]
    return sum(pages) * os.sysconf("SC_PAGESIZE") / 2**20


def serve(folder: Path, compare: str, port: int = 5987) -> dict[str, Any]:
    """Start, memory and page times of ``kvsharer ui`` on the store in ``folder``."""
    command = [sys.executable, "-m", "kvsharer_exp", "ui", f"ui.port={port}"]
    started = time.perf_counter()
    server = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert server.stdout is not None
        address = next(line for line in server.stdout if "Ctrl-C" in line).split()[0]
        found: dict[str, Any] = {"ui_up_seconds": time.perf_counter() - started}
        found["ui_resident_mib"] = resident_mib(server.pid)
        if CHROMIUM is not None:
            pages = {
                "runs_table": (address, "document.querySelectorAll('[role=row]').length > 1"),
                "compare": (
                    f"http://127.0.0.1:{port}/#{compare}",
                    "document.querySelectorAll('.scatterlayer .point').length > 1",
                ),
            }
            with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as page:
                for again in ("first", "again"):
                    for name, (url, ready) in pages.items():
                        started = time.perf_counter()
                        page.open(url)
                        page.wait(ready, 300)
                        found[f"{name}_{again}_seconds"] = time.perf_counter() - started
            found["ui_resident_mib_afterwards"] = resident_mib(server.pid)
        return found
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def main(count: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    uri = f"sqlite:///{folder}/mlruns/mlflow.db"
    found = log_trials(Tracker.open(uri, artifacts=str(folder / "mlruns/artifacts")), count)
    print(json.dumps({**found, **serve(folder, found["compare"])}, indent=2))


if __name__ == "__main__":
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    if len(sys.argv) > 2:
        main(trials, Path(sys.argv[2]).resolve())
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(trials, Path(scratch))
