"""A worker process: reads plans from its standard input, one a line, and writes outcomes.

`ProcessCrew` starts it as ``python -m kvsharer_exp.search.execution.worker``. The first line of the
input says how to make the scorer. What else is printed here goes to standard error, which is the
worker's log. The process ends with its input, so it outlives no coordinator, however that ends. It
also ends when it loses its device (`base.DeviceLostError`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from importlib import import_module
from queue import SimpleQueue
from typing import Any

from kvsharer_exp.measure.machine import settle
from kvsharer_exp.search.execution.base import Score, Task, attempt
from kvsharer_exp.values.errors import InputError


def make_score(make: str, settings: str) -> Score:
    """Call the function ``make`` (``package.module:function``) with ``settings``.

    It may import torch: first this process is settled as that of the command line is.
    """
    settle()
    module, _, name = make.partition(":")
    score: Score = getattr(import_module(module), name)(settings)
    return score


def main() -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    first = json.loads(sys.stdin.readline())
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    try:
        score = make_score(first["make"], first["settings"])
        say(ready=True)
        while True:
            say(done=attempt(score, Task.from_json(lines.get())).to_dict())
    except InputError as error:
        say(refused=str(error))


def _read(lines: SimpleQueue[str]) -> None:
    """Pass the lines of the input on; end the process with it, also while it scores a plan."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
