"""Do on a GPU what cannot run anywhere else, in sittings of eight minutes: ``make gpu``.

    python -m tests.benchmarks.gpu [--minutes 8] [--out docs/results/gpu] [--only 'bench-7b-*' …]
    python -m tests.benchmarks.gpu --tiny          # a rehearsal with tiny shapes, on the CPU

The work is a list of parts (`parts`): the GPU-marked tests by file, the evaluator's seconds a
trial, and cells of ``bench``. A part writes ``parts/NAME.json`` when it is done, and the same
command goes on with the parts that are missing. Delete a file to have its part done again. When the
minutes are over, the part under way is killed, and the next call begins with it. A part that ended
twice without a result, killed or by an error, is kept as such and left alone. All parts of a folder
come from one card and one torch: another is refused. They may come from several commits, which the
page names.

At the end ``gpu.md`` is written from all parts there are. The exit code is 0 when all is done, 1
when all is done but a test failed or a part has no result, 2 for bad input, 3 when parts are left.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from kvsharer_exp.model.files import write_atomically
from tests.benchmarks.gpu.page import page, troubles
from tests.benchmarks.gpu.parts import MACHINE, ROOT, UNDER_WAY, Part, all_parts

WORKER = (sys.executable, "-m", "tests.benchmarks.gpu.worker")
TRIES = 2
BAD_INPUT, LEFT, INTERRUPTED = 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after so many minutes")
    parser.add_argument("--out", type=Path, help="the folder of the parts and of gpu.md")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="the parts of these names")
    parser.add_argument("--tiny", action="store_true", help="rehearse on the CPU")
    options = parser.parse_args(argv)
    folder = options.out or Path("outputs/gpu_rehearsal" if options.tiny else "docs/results/gpu")
    wanted = options.only or ["*"]
    everything = all_parts(options.tiny)
    parts = [part for part in everything if any(fnmatch(part.name, name) for name in wanted)]
    if not parts:
        names = ", ".join(part.name for part in everything[:3])
        print(f"gpu: no part is named {' or '.join(wanted)}: give names like {names}, …")
        return BAD_INPUT
    code = sitting(folder, parts, "cpu" if options.tiny else "cuda", options.minutes * 60)
    if (folder / MACHINE).exists() and code != BAD_INPUT:
        write_atomically(folder / "gpu.md", page(folder, everything))
    if code:
        return code
    left = missing(folder, parts)
    if left:
        again = " ".join(sys.argv[1:] if argv is None else argv)
        print(f"{len(left)} of {len(parts)} parts are left, {left[0].name} first; continue with")
        print(f"  python -m tests.benchmarks.gpu {again}".rstrip())
        return LEFT
    said = troubles(folder, parts)
    print(f"all {len(parts)} parts are done: see {folder / 'gpu.md'}")
    print("".join(f"  {line}\n" for line in said), end="")
    return 1 if said else 0


def missing(folder: Path, parts: Sequence[Part]) -> list[Part]:
    return [part for part in parts if not part.path(folder).exists()]


def sitting(folder: Path, parts: Sequence[Part], device: str, seconds: float) -> int:
    """Start workers until all is done or the time is over; 0, or the code to exit with."""
    ends = time.monotonic() + seconds
    under_way = folder / UNDER_WAY
    while (left := missing(folder, parts)) and time.monotonic() < ends:
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        under_way.unlink(missing_ok=True)
        code, ended = _worker(folder, left, device, ends - time.monotonic())
        if code in (BAD_INPUT, INTERRUPTED):
            return code
        if under_way.exists():
            _count(folder, under_way, ended)
        elif code > 0:  # it did not come as far as a part
            print(f"gpu: the worker {ended}; see {folder / 'worker.log'}")
            return 1
    return 0


def _worker(folder: Path, parts: Sequence[Part], device: str, seconds: float) -> tuple[int, str]:
    """Run one worker for at most ``seconds``: its exit code, and how it ended in words."""
    command = [*WORKER, str(os.getpid()), str(folder.resolve()), device]
    command += [part.name for part in parts]
    with (folder / "worker.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, stderr=log, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return 0, "killed at the end of the sitting"
        except KeyboardInterrupt:
            print("gpu: interrupted; what was done is kept")
            return INTERRUPTED, "interrupted"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that a test started
                process.wait()
        log.seek(0)
        last = (log.read().strip().splitlines() or [""])[-1][:300]
        return code, f"ended with exit code {code}: {last}"


def _count(folder: Path, under_way: Path, ended: str) -> None:
    """Remember that the part under way ended without a result; after two times give it up."""
    name = under_way.read_text(encoding="utf-8")
    part, path = Part(name, ""), folder / "attempts.json"
    if part.path(folder).exists():
        return  # killed between its result and the next part
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    seconds = time.time() - under_way.stat().st_mtime
    known.setdefault(name, []).append(f"{ended} (after {seconds:.0f} s)")
    print(f"{name}: {known[name][-1]}", flush=True)
    if len(known[name]) >= TRIES:
        kept = {"name": name, "without_result": known.pop(name)}
        write_atomically(part.path(folder), json.dumps(kept, indent=1) + "\n")
    write_atomically(path, json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
