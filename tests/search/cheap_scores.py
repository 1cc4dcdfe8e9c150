"""Scores that cost no model, and workers that misbehave; it imports little, to start fast."""

import fcntl
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from kvsharer_exp.search.outcome import FIT, Bar, Outcome
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan


def loss(plan: KVPlan) -> float:
    costs = {"x": 0.3, "q": 0.02}
    return sum(costs.get("q" if "q" in t else t, 0.0) * (1 + i) for i, t in enumerate(plan.texts))


def make_score(settings: str) -> Any:
    """What a worker calls; ``settings`` is JSON.

    - ``log``: a file to which each plan is added before it is scored;
    - ``seconds``: how long a plan takes;
    - ``slow``, ``dies``, ``dies_once``, ``breaks_once``, ``hangs``, ``fails``, ``overflows``: the
      numbers of plans, by when they first began, that do so; one that breaks ends the device too;
    - ``refuses``: whether the worker refuses to start; ``crashes``: whether it fails to.
    """
    told = json.loads(settings)
    if told.get("refuses"):
        raise InputError("the model is not here: put it there")
    if told.get("crashes"):
        raise KeyError("a typo")
    log = Path(told["log"])
    broken: list[int] = []

    def score(plan: KVPlan, bar: Bar) -> Outcome:
        with log.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # two workers may begin at once
            file.seek(0)
            before = file.read().split()
            file.write(f"{plan}\n")
        known = list(dict.fromkeys(before))
        is_new = str(plan) not in known
        order = len(known) if is_new else known.index(str(plan))
        if order in told.get("dies", ()) or (is_new and order in told.get("dies_once", ())):
            os.kill(os.getpid(), signal.SIGKILL)
        if is_new and order in told.get("breaks_once", ()):
            broken.append(order)
        if broken:
            raise RuntimeError(
                "CUDA error: device-side assert triggered\nCompile with TORCH_USE_X."
            )
        if order in told.get("hangs", ()):
            time.sleep(1000)
        if order in told.get("fails", ()):
            raise RuntimeError("out of memory")
        time.sleep(1.5 if order in told.get("slow", ()) else told.get("seconds", 0.0))
        value = float("inf") if order in told.get("overflows", ()) else loss(plan)
        return Outcome({FIT: value, "kl": value}, "complete", "fit", -value, "", (value,) * 2)

    return score
