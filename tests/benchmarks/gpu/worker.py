"""The process that does the parts of ``make gpu``; the driver starts it and kills it in time.

    python -m tests.benchmarks.gpu.worker DRIVER FOLDER DEVICE PART …

It does in order what is not done yet. A part that raises ends the process, because an error on a
GPU may leave it useless to this process. So does the end of the process ``DRIVER``, once the part
under way is done.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsharer_exp.measure.machine import settle

settle()

import torch

from kvsharer_exp.model.files import locked, write_atomically
from kvsharer_exp.tracking.environment import environment
from kvsharer_exp.values.errors import InputError
from tests.benchmarks.gpu.parts import MACHINE, UNDER_WAY, Part, all_parts
from tests.benchmarks.gpu.work import WORK, clear


def machine(device: str) -> dict[str, Any]:
    """The card and the software that numbers depend on.

    Raises:
        InputError: there is no CUDA device.
    """
    software = {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    software["transformers"] = environment()["transformers"]
    if device == "cpu":
        return {"card": "the CPU (a rehearsal)", "memory_gib": None, **software}
    if not torch.cuda.is_available():
        raise InputError("there is no CUDA device here: rehearse on the CPU with --tiny")
    card = torch.cuda.get_device_properties(0)
    return {"card": card.name, "memory_gib": round(card.total_memory / 2**30), **software}


def work(folder: Path, parts: Sequence[Part], device: str, driver: int | None = None) -> None:
    """Do those of ``parts`` that have no result in ``folder`` yet, in order.

    If ``driver`` is given and not, or no longer, the parent process, no part is begun.

    Raises:
        InputError: the folder holds parts of another card, or of other software.
    """
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    commit = environment()["git_commit"]
    with locked(folder / ".lock"):  # the worker of a driver that was killed ends first
        _same_machine(folder, machine(device))
        for part in parts:
            if part.path(folder).exists():
                continue
            if driver not in (None, os.getppid()):
                return
            (folder / UNDER_WAY).write_text(part.name, encoding="utf-8")
            clear(device)
            began = time.perf_counter()
            try:
                result = WORK[part.kind](device=device, **part.arguments)
            except torch.OutOfMemoryError as error:  # a result: this card is too small for it
                said = str(error).partition("\n")[0]
                result = {**part.arguments, "out_of_memory": said}
            seconds = time.perf_counter() - began
            kept = {"name": part.name, "commit": commit, "seconds": seconds, "result": result}
            write_atomically(part.path(folder), json.dumps(kept, indent=1) + "\n")
            (folder / UNDER_WAY).unlink(missing_ok=True)  # a new driver clears it too
            print(f"{part.name}: {seconds:.1f} s", flush=True)


def _same_machine(folder: Path, here: dict[str, Any]) -> None:
    path = folder / MACHINE
    if not path.exists():
        write_atomically(path, json.dumps(here, indent=1) + "\n")
    known = json.loads(path.read_text(encoding="utf-8"))
    for name, value in here.items():
        if known.get(name) != value:
            raise InputError(
                f"{folder} holds parts made with {name}={known.get(name)}, and here it is {value}: "
                "give another --out"
            )


def main() -> int:
    driver, folder, device, *names = sys.argv[1:]
    known = {part.name: part for part in all_parts(tiny=device == "cpu")}
    try:
        work(Path(folder), [known[name] for name in names], device, int(driver))
    except InputError as error:
        if (Path(folder) / UNDER_WAY).exists():
            raise  # a part met it: that is no fault of the command line
        print(f"gpu: {error}", flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
